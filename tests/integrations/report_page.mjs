// Opens reports in a headless Chromium: a JSON list of their paths on stdin, and on stdout what a reader of
// each would meet, for each of the two colour schemes and two widths.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, executablePath, shots] = process.argv.slice(2);
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

// runs in the page
function look() {
  const luminance = ([red, green, blue]) => {
    const linear = [red, green, blue].map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const parts = (color) => color.match(/[\d.]+/g).map(Number);
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

  for (const details of document.querySelectorAll("details")) details.open = true;
  const faint = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("svg")) continue;
    texts += 1;
    const ratio = contrast(parts(getComputedStyle(element).color), behind(element));
    if (ratio < 4.5) faint.push([walker.currentNode.data, ratio]);
  }
  // of what is drawn, against the page: as the guidelines ask for what is no text
  for (const shape of document.querySelectorAll("rect, path")) {
    const ratio = contrast(parts(getComputedStyle(shape).fill), behind(shape.closest("svg")));
    if (ratio < 3) faint.push([shape.outerHTML, ratio]);
  }
  const sees = (element) => {
    const { width, height } = element.getBoundingClientRect();
    return width > 0 && height > 0;
  };
  const text = (element) => element.innerText.trim();
  const cells = (row) => [...row.cells].map(text);
  const rows = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].map(cells);
  const label = (box) => box.querySelector(":scope > p").innerText;
  const flowing = (element) => [...element.children].some((child) => child.scrollWidth > element.clientWidth + 1);
  return {
    title: document.title,
    heading: text(document.querySelector("h1")),
    sections: [...document.querySelectorAll("section")].map((section) => section.id),
    unseen: [...document.querySelectorAll("section, h1, h2, table, svg, details, .box, dd")]
      .filter((element) => !sees(element))
      .map((element) => element.outerHTML.slice(0, 200)),
    sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    spilling: [...document.querySelectorAll("section > *, dd, .box p, td, th")]
      .filter((element) => element.scrollWidth > element.clientWidth + 1)
      .filter((element) => !element.matches(".scroll"))
      .map((element) => element.outerHTML.slice(0, 200)),
    texts,
    faint,
    background: getComputedStyle(document.body).backgroundColor,
    styled: getComputedStyle(document.querySelector("main")).maxWidth,
    tiles: Object.fromEntries([...document.querySelectorAll("dd > span")].map((tile) => [tile.id, text(tile)])),
    stages: rows("stages"),
    errors: rows("errors"),
    retries: rows("retries"),
    slowest: [...document.querySelectorAll("summary")].map(text),
    boxes: [...document.querySelectorAll(".box")].map(label),
    bars: document.querySelectorAll(".chart rect").length,
    tags: [...new Set([...document.querySelectorAll("*")].map((element) => element.localName))].sort(),
  };
}

async function open(path, colorScheme, width) {
  const context = await browser.newContext({ colorScheme, viewport: { width, height: 900 } });
  const page = await context.newPage();
  const complaints = [];
  const requests = [];
  page.on("console", (message) => complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("dialog", async (dialog) => {
    complaints.push(`dialog: ${dialog.message()}`);
    await dialog.dismiss();
  });
  const url = pathToFileURL(path).href;
  page.on("request", (request) => requests.push(request.url()));
  await page.goto(url);
  const seen = await page.evaluate(look);
  await page.waitForTimeout(50);
  if (shots) await page.screenshot({ path: `${path}-${colorScheme}-${width}.png`, fullPage: true });
  await context.close();
  return { ...seen, colorScheme, width, complaints, others: requests.filter((request) => request !== url) };
}

const results = [];
for (const path of JSON.parse(readFileSync(0, "utf8"))) {
  const looks = [];
  for (const colorScheme of ["light", "dark"]) {
    for (const width of [400, 1280]) looks.push(await open(path, colorScheme, width));
  }
  results.push(looks);
}
await browser.close();
process.stdout.write(JSON.stringify(results));
