// Has the real mermaid read and render flowcharts: a JSON list of their texts on stdin, and on stdout what
// became of each: {"error"}, or what was read, with the labels as they stand in the rendered SVG.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const { resolve } = createRequire(join(folder, "package.json"));
const { JSDOM } = await import(pathToFileURL(resolve("jsdom")));

const { window } = new JSDOM("<body></body>");
const own = ["document", "DOMParser", "Element", "HTMLElement", "SVGElement", "Node", "XMLSerializer"];
Object.assign(globalThis, { window }, Object.fromEntries(own.map((name) => [name, window[name]])));
// what jsdom lacks, because it lays nothing out
globalThis.CSSStyleSheet = class {
  cssRules = [];
  replaceSync() {}
  insertRule() {}
};
window.SVGElement.prototype.getBBox = () => ({ x: 0, y: 0, width: 80, height: 20 });
window.SVGElement.prototype.getComputedTextLength = () => 80;

const { default: mermaid } = await import(
  pathToFileURL(join(folder, "node_modules/mermaid/dist/mermaid.core.mjs"))
);
mermaid.initialize({ startOnLoad: false });

function textOf(element) {
  // a line of its own for each <br>
  for (const br of element.querySelectorAll("br")) br.replaceWith("\n");
  return element.textContent;
}

function labels(svg, selector, prefix) {
  const found = {};
  for (const group of svg.querySelectorAll(selector)) {
    found[prefix.exec(group.id)[1]] = textOf(group.querySelector(".nodeLabel"));
  }
  return found;
}

async function read(text, index) {
  const { db } = await mermaid.mermaidAPI.getDiagramFromText(text);
  const edges = db.getEdges().map(({ start, end, text, stroke }) => ({ start, end, text, stroke }));
  const subgraphs = db.getSubGraphs().map(({ id, nodes }) => ({ id, nodes }));
  const inside = new Set(subgraphs.map(({ id }) => id));
  const vertices = [...db.getVertices().values()].filter(({ id }) => !inside.has(id));
  const nodes = vertices.map(({ id, type }) => ({ id, type }));
  const rendered = await mermaid.render(`m${index}`, text);
  const svg = new window.DOMParser().parseFromString(rendered.svg, "text/html");
  return {
    nodes,
    edges,
    subgraphs,
    labels: labels(svg, "g.node", /-flowchart-(n\w+)-\d+$/),
    titles: labels(svg, "g.cluster", /-(n\w+)$/),
    arrows: svg.querySelectorAll("path.flowchart-link").length,
    foreign: svg.querySelectorAll("a, img, script, iframe, strong, em, code, del, ul, ol").length,
  };
}

const results = [];
for (const [index, text] of JSON.parse(readFileSync(0, "utf8")).entries()) {
  try {
    results.push(await read(text, index));
  } catch (error) {
    results.push({ error: String(error?.stack ?? error) });
  }
}
process.stdout.write(JSON.stringify(results));
