"""The style sheet and the script of the page that `benchmarks.html_report` writes."""

from __future__ import annotations

# The series' colors have a contrast of 3 or more with the background, and are told apart by people who see two
# primary colors only; besides, each provider has a symbol.
CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f5f6f8; --text: #1b1f24; --muted: #545b64; --rule: #d9dde2; --link: #00558c;
  --slower: #a62b00; --series-1: #0065a8; --series-2: #b86200; --series-3: #008060; --series-4: #a8408a;
  --series-5: #2f8fc4; --series-6: #4a4f55; --series-7: #9933ff; --series-8: #000033;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1e2329; --text: #e8eaed; --muted: #a9b1ba; --rule: #363d46; --link: #8ccbff;
    --slower: #ff9d75; --series-1: #58aef0; --series-2: #f0a53a; --series-3: #34c79c; --series-4: #e58cca;
    --series-5: #a5dcfa; --series-6: #c5cad0; --series-7: #aa00ff; --series-8: #8f5924;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 1rem; top: 1rem; background: var(--page); padding: .5rem; z-index: 1; }
header, main, footer, nav { padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.5rem; line-height: 1.25; margin: 3rem 0 .75rem; padding-top: .75rem; }
section + section h2 { border-top: 2px solid var(--rule); }
h3 { font-size: 1.15rem; margin: 2.25rem 0 .25rem; }
h4 { font-size: 1rem; margin: 1rem 0 0; }
p, .notes ul { max-width: 46rem; }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
code { font-size: .92em; overflow-wrap: anywhere; }
nav ul { padding-left: 1.1rem; margin: .25rem 0; }
nav li { margin: .15rem 0; }
.machines { display: grid; gap: 1rem 2.5rem; grid-template-columns: minmax(0, 1fr); }
article { min-width: 0; }
figure { margin: .5rem 0; }
figure, .long details { max-width: 62rem; }
.plot { width: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; padding: 0; margin: .4rem 0 0; }
.legend li { display: flex; align-items: center; gap: .4rem; font-size: .85rem; }
.legend svg { width: .8rem; height: .8rem; flex: none; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; color: var(--muted); padding: .4rem 0; }
th, td { padding: .25rem .45rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); }
th[scope=row], th[scope=rowgroup], thead th:first-child, td.text { text-align: left; }
thead th { vertical-align: bottom; }
table.text th { text-align: left; }
table.text td:nth-child(2) { min-width: 16rem; }
th[scope=row] { font-weight: 400; }
th[scope=rowgroup] { padding-top: .7rem; }
th[scope=rowgroup] small { font-weight: 400; color: var(--muted); white-space: nowrap; }
td data { white-space: nowrap; }
.slower { color: var(--slower); font-weight: 600; }
summary { cursor: pointer; padding: .4rem 0; color: var(--link); }
button {
  font: inherit; color: var(--link); background: none; border: 1px solid currentColor; border-radius: .3rem;
  padding: .3rem .7rem; cursor: pointer;
}
footer { margin: 3rem 0 2rem; }
@media (min-width: 1080px) {
  body { display: grid; grid-template-columns: 15.5rem minmax(0, 1fr); max-width: 110rem; margin: 0 auto; }
  header, footer { grid-column: 2; padding: 1.5rem 2rem 0; }
  nav {
    grid-column: 1; grid-row: 1 / span 3; position: sticky; top: 0; align-self: start; max-height: 100vh;
    overflow-y: auto; padding: 1.5rem 0 1.5rem 1.5rem; font-size: .9rem;
  }
  main { padding: 0 2rem; }
  .machines.several { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .one article { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 2.5rem; align-items: start; }
  .one article h4 { grid-column: 1 / -1; }
}
@media print { button, nav { display: none; } }
"""

# Charts are drawn when they come near the screen, since all of them at once keep a phone busy for seconds.
SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = [...document.querySelectorAll("[data-figure]")];
const drawn = new Set();
function colored(value, style) {
  if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return value.map((item) => colored(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, colored(item, style)]));
}
function draw(plot) {
  const style = getComputedStyle(document.documentElement);
  const figure = colored(figures[plot.dataset.figure], style);
  figure.layout.font.family = getComputedStyle(document.body).fontFamily;
  drawn.add(plot);
  Plotly.react(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false, doubleClick: false });
}
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "800px" });
plots.forEach((plot) => near.observe(plot));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
addEventListener("beforeprint", () => plots.filter((plot) => !drawn.has(plot)).forEach(draw));
const tables = [...document.querySelectorAll("details.numbers")];
const wide = matchMedia("(min-width: 1080px)").matches;
tables.forEach((table) => { table.open = wide && table.closest(".one") !== null; });
const button = document.getElementById("tables");
button.hidden = false;
button.addEventListener("click", () => {
  const open = tables.some((table) => !table.open);
  tables.forEach((table) => { table.open = open; });
  button.textContent = open ? "Close all tables" : "Open all tables";
});
"""
