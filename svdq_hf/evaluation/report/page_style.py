"""Style of the report page: its CSS, and the JavaScript that sorts a table on a click, as text.

Both go into the page itself: it refers to nothing outside, so it can be mailed, archived and opened
without a network. Without the script every table is still there, only not sortable.
"""

from typing import Final

CSS: Final = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --quiet: #59636e; --line: #d0d7de;
  --head: #f3f5f7; --mark: #0a5dc2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e3e7ec; --quiet: #9aa4af; --line: #343b43; --head: #1d2228;
    --mark: #78b2ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 16px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, li { max-width: 72ch; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
a { color: var(--mark); }
.note { color: var(--quiet); font-size: .875rem; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0 .5rem; }
.box:focus-visible, button:focus-visible { outline: 2px solid var(--mark); outline-offset: -2px; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { background: var(--head); vertical-align: bottom; padding: 0; }
th button { all: unset; box-sizing: border-box; width: 100%; padding: .4rem .5rem; cursor: pointer;
  font-weight: 600; text-align: inherit; white-space: normal; overflow-wrap: normal; }
th.still { padding: .4rem .5rem; font-weight: 600; white-space: normal; overflow-wrap: break-word; }
th button::after { content: "\\2195"; color: var(--quiet); padding-left: .3em; font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: var(--mark); }
th[aria-sort=descending] button::after { content: "\\2193"; color: var(--mark); }
.words { text-align: left; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); }
th:first-child { background: var(--head); }
@media (max-width: 600px) { td:first-child { white-space: normal; min-width: 5.5rem; overflow-wrap: normal; }
  th, td { padding: .3rem .35rem; } }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px;
  align-items: start; }
figure { margin: 0; max-width: 560px; }
figure svg { display: block; width: 100%; height: auto; }
figure text { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; }
"""

# NaN, and entries that are absent, come last in either direction.
SCRIPT: Final = """
const value = (row, at) => row.cells[at].dataset.sort;
const before = (a, b, numbers) => numbers ? a - b : a.localeCompare(b);
function sort(head) {
  const table = head.closest("table"), at = head.cellIndex, numbers = head.dataset.numbers !== undefined;
  const up = head.getAttribute("aria-sort") !== "ascending";
  const known = (row) => value(row, at) !== "" && !(numbers && Number.isNaN(Number(value(row, at))));
  const rows = [...table.tBodies[0].rows];
  const order = (a, b) => (up ? 1 : -1) * before(value(a, at), value(b, at), numbers);
  const there = rows.filter(known).sort(order);
  table.tBodies[0].append(...there, ...rows.filter((row) => !known(row)));
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
}
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sort(button.closest("th")));
"""
