// Opens the page of the jobs in a headless Chromium, from a site that its arguments name, and prints as JSON
// what a reader meets: how pages look, what becomes of one while its jobs go on, and where the keyboard leads.
import { createRequire } from "node:module";
import { join } from "node:path";

const [folder, executablePath, site, names, shots] = process.argv.slice(2);
const { chromium } = createRequire(join(folder, "package.json"))("playwright-core");
const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
const PATIENCE = 20_000; // milliseconds

async function until(page, condition, argument) {
  const end = Date.now() + PATIENCE;
  while (!(await page.evaluate(condition, argument))) {
    if (Date.now() > end) throw new Error(`never: ${condition} ${JSON.stringify(argument)}`);
    await new Promise((done) => setTimeout(done, 10));
  }
}

// a page whose clock stands still, and that notes what its script asks for
async function open(path, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  const complaints = [];
  const requests = [];
  page.on("console", (message) => complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("dialog", async (dialog) => {
    complaints.push(`dialog: ${dialog.message()}`);
    await dialog.dismiss();
  });
  page.on("request", (request) => requests.push(request.url().replace(site, "")));
  if (options.javaScriptEnabled !== false) {
    await page.addInitScript(() => {
      const real = window.fetch;
      window.asked = [];
      window.answered = 0;
      const answer = () => (window.answered += 1);
      window.fetch = async (url, options) => {
        window.asked.push(`${options.method} ${url} ${options.headers.Accept}`);
        const response = await real(url, options).catch((error) => {
          answer();
          throw error;
        });
        if (!response.ok) answer();
        const json = response.json.bind(response);
        response.json = () => json().finally(answer);
        return response;
      };
      let hidden = false;
      Object.defineProperty(document, "hidden", { get: () => hidden });
      window.hide = (now) => {
        hidden = now;
        document.dispatchEvent(new Event("visibilitychange"));
      };
    });
    await page.clock.install({ time: 0 });
    await page.clock.pauseAt(1000);
  }
  await page.goto(site + path);
  if (options.javaScriptEnabled !== false) {
    await until(page, () => window.asked.length);
    await settled(page);
  }
  return { context, page, complaints, requests };
}

// until the script waits for its clock again
async function settled(page) {
  await until(page, () => window.answered === window.asked.length);
}

// runs in the page
function look() {
  const parts = (color) => color.match(/[\d.]+/g).map(Number);
  const luminance = (color) => {
    const [red, green, blue] = color.map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const [red, green, blue, alpha = 1] = parts(getComputedStyle(node).backgroundColor);
      if (alpha > 0) return [red, green, blue];
    }
    return [255, 255, 255];
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const isShown = (element) => element.checkVisibility() && !element.closest("template, noscript, script");
  const outer = (element) => element.outerHTML.slice(0, 200);

  const faint = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !isShown(element)) continue;
    texts += 1;
    const ratio = contrast(parts(getComputedStyle(element).color), behind(element));
    if (ratio < 4.5) faint.push([walker.currentNode.data, ratio]);
  }
  for (const status of all(".status")) {
    const ratio = contrast(parts(getComputedStyle(status, "::before").color), behind(status));
    if (ratio < 3) faint.push([outer(status), ratio]);
  }
  const blocks = all("h1, h2, h3, p, th, td, time, article, .job, .status").filter(isShown);
  return {
    title: document.title,
    heading: document.querySelector("h1").innerText,
    processes: all("article").map((process) =>
      [...process.children].filter(isShown).map((child) => child.innerText),
    ),
    rows: all("tbody tr").map((row) =>
      [...row.querySelectorAll("a, span, p, time, button")].filter(isShown).map((part) => part.innerText),
    ),
    bars: all("progress").map((bar) => bar.value),
    links: all("a").filter(isShown).map((link) => link.getAttribute("href")),
    none: isShown(document.getElementById("none")),
    noscript: document.querySelector("noscript").checkVisibility(),
    unseen: all("h1, h2, h3, pre, .job, .status, progress")
      .filter((element) => !element.getBoundingClientRect().width || !element.getBoundingClientRect().height)
      .map(outer),
    spilling: blocks.filter((element) => element.scrollWidth > element.clientWidth + 1 && element.clientWidth)
      .map(outer),
    outside: all("body *")
      .filter((element) => isShown(element) && element.getBoundingClientRect().right > innerWidth + 1)
      .map(outer),
    broken: all(".status").filter((element) => {
      const range = document.createRange();
      range.selectNodeContents(element);
      return new Set([...range.getClientRects()].map((box) => box.top)).size > 1;
    }).map(outer),
    sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    texts,
    faint,
    background: getComputedStyle(document.body).backgroundColor,
    tags: [...new Set(all("*").map((element) => element.localName))].sort(),
    html: all("tbody tr").map((row) => row.outerHTML.replace(/<button.*?<\/button>/, "")),
  };
}

async function looks(name) {
  const found = [];
  for (const colorScheme of ["light", "dark"]) {
    for (const width of [400, 1280]) {
      for (const javaScriptEnabled of [true, false]) {
        const options = { colorScheme, javaScriptEnabled, viewport: { width, height: 900 } };
        const { context, page, complaints, requests } = await open(`/${name}/`, options);
        const seen = await page.evaluate(look);
        const aria = await page.locator("body").ariaSnapshot();
        const path = `${shots}/${name}-${colorScheme}-${width}-${javaScriptEnabled ? "live" : "still"}.png`;
        if (shots) await page.screenshot({ path, fullPage: true });
        await context.close();
        found.push({ ...seen, aria, colorScheme, width, javaScriptEnabled, complaints, requests });
      }
    }
  }
  return found;
}

// -- a page while its jobs go on

const say = (state) => fetch(`${site}/say`, { method: "POST", body: JSON.stringify(state) });
const job = (jobID, status, progress = 0, more = {}) => ({
  jobID,
  status,
  progress,
  type: "process",
  processID: "orders",
  created: "2026-01-02T03:04:05.678Z",
  updated: "2026-01-02T03:04:05.678Z",
  ...more,
});

async function live() {
  await say({ jobs: [job("b", "running", 10, { message: "a tenth" }), job("a", "accepted")] });
  const { context, page, complaints, requests } = await open("/live/");
  const seen = {};
  let told = 0;
  const note = async (name) => {
    seen[name] = await page.evaluate((told) => ({
      asked: window.asked.slice(told),
      rows: [...document.querySelectorAll("tbody tr")].map((row) => {
        const shown = [...row.querySelectorAll(".status, .percent, .message, .results, .dismiss")];
        return [row.querySelector(".job"), ...shown.filter((part) => !part.hidden)]
          .map((part) => part.textContent)
          .join(" ");
      }),
      bars: [...document.querySelectorAll("progress")].map((bar) => bar.value),
      columns: [...document.querySelectorAll("thead th")].map((header) => header.offsetLeft),
      news: document.getElementById("news").textContent,
      focus: document.activeElement.getAttribute("href") ?? document.activeElement.id,
      selection: String(getSelection()),
      same: (window.kept ?? []).map((row) => row.isConnected),
      changes: window.changes,
      table: !document.querySelector("table").hidden,
      none: !document.getElementById("none").hidden,
    }), told);
    told += seen[name].asked.length;
  };
  // runs the page's clock up to just before something, and then on to it
  const after = async (name, milliseconds, state) => {
    if (state) await say(state);
    await page.clock.runFor(milliseconds - 1);
    await settled(page);
    await note(`just before ${name}`);
    await page.clock.runFor(1);
    await settled(page);
    await note(name);
  };
  await note("first");

  await page.evaluate(() => {
    window.kept = [...document.querySelectorAll("tbody tr")];
    kept[0].querySelector(".job").focus();
    getSelection().selectAllChildren(kept[1].querySelector(".process"));
  });
  const half = [job("c", "accepted"), job("b", "running", 55, { message: "half" }), job("a", "running", 1)];
  await after("changed", 1000, { jobs: half });
  await page.evaluate(() => {
    window.changes = 0;
    const observer = new MutationObserver((records) => (window.changes += records.length));
    const all = { subtree: true, childList: true, attributes: true, characterData: true };
    observer.observe(document.body, all);
  });
  await after("unchanged", 1000);
  await page.locator("[data-status=running] .dismiss").first().focus();
  await after("ended", 1000, { jobs: [half[0], job("b", "successful", 100), half[2]] });

  await after("down", 1000, { mode: "down" });
  await after("refused", 5000, { mode: "503" });
  await after("no JSON", 5000, { mode: "garbage" });
  await after("back", 5000, { mode: "", jobs: [half[0], job("b", "successful", 100), job("a", "running", 2)] });

  await say({ mode: "hanging" });
  await page.clock.runFor(1000 + 9999);
  await note("just before too late");
  await page.clock.runFor(1);
  await settled(page);
  await note("too late");
  await after("in time", 5000, { mode: "" });

  await page.evaluate(() => window.hide(true));
  await page.clock.runFor(60_000);
  await settled(page);
  await note("hidden");
  await page.evaluate(() => window.hide(false));
  await settled(page);
  await note("seen again");
  await page.evaluate(() => window.hide(true));
  await page.evaluate(() => window.hide(false));
  await settled(page);
  await note("seen once more");

  const four = ["g", "f", "e", "d"].map((id) => job(id, "running", 50));
  await page.locator("tbody tr").last().locator(".job").focus();
  await after("evicted", 1000, { jobs: four });
  await after("four ended", 1000, { jobs: four.map((one) => ({ ...one, status: "failed" })) });
  await after("idle", 5000, { jobs: [job("h", "running", 7)] });

  const button = page.locator(".dismiss");
  await say({ mode: "slow" });
  await button.focus();
  await page.keyboard.press("Enter");
  await page.keyboard.press("Enter");
  await until(page, () => window.asked.at(-1).startsWith("DELETE"));
  await page.clock.runFor(1000);
  await until(page, () => window.answered === window.asked.length - 1);
  await note("being dismissed");
  await say({ mode: "" });
  await until(page, () => document.querySelector("[data-status=dismissed]"));
  await settled(page);
  await note("dismissed");

  await after("another", 5000, { jobs: [job("j", "running", 7), job("i", "running", 7)] });
  await say({ jobs: [job("j", "successful", 100), job("i", "running", 7)] });
  await button.first().click();
  await until(page, () => document.querySelector("[data-status=successful]"));
  await settled(page);
  await note("ended before");
  await say({ jobs: [] });
  await button.last().click();
  await until(page, () => document.getElementById("news").textContent.includes("dismiss"));
  await settled(page);
  await note("gone before");
  await after("anew", 5000, { jobs: [job("k", "accepted", 0, { message: "long ".repeat(50) })] });
  await say({ mode: "503" });
  await button.click();
  await until(page, () => document.getElementById("news").textContent.includes("refresh"));
  await note("refused to dismiss");
  await say({ mode: "" });
  await button.click();
  await until(page, () => document.querySelector("[data-status=dismissed]"));
  await settled(page);
  await note("dismissed at last");
  await context.close();
  return { seen, complaints, requests };
}

// -- where the keyboard leads

async function tabbed(name) {
  const { context, page } = await open(`/${name}/`, { viewport: { width: 400, height: 900 } });
  const stops = [];
  for (;;) {
    await page.keyboard.press("Tab");
    const stop = await page.evaluate(() => {
      const { activeElement: node } = document;
      const { outlineStyle, outlineWidth } = getComputedStyle(node);
      return [node.localName, node.getAttribute("href") ?? node.ariaLabel, `${outlineStyle} ${outlineWidth}`];
    });
    if (stop[0] === "body" || stops.length > 200) break;
    stops.push(stop);
  }
  await context.close();
  return stops;
}

// -- the same by the script as without it

async function copied(name) {
  await say({ jobs: [] });
  const { context, page } = await open("/live/");
  await say({ copy: name });
  await page.clock.runFor(5000);
  await until(page, () => document.querySelector("tbody tr"));
  const { html } = await page.evaluate(look);
  await context.close();
  return html.map((row) => row.replaceAll("/live/", `/${name}/`));
}

const results = { looks: {}, copies: {} };
for (const name of names.split(",")) {
  results.looks[name] = await looks(name);
  if (name !== "empty") results.copies[name] = await copied(name);
}
results.tabbed = await tabbed("busy");
results.live = await live();
await browser.close();
process.stdout.write(JSON.stringify(results));
