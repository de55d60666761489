"use strict"; // The list of runs: sorted by a column, filtered by words, and runs beside each other.
const rows = [...document.querySelectorAll("#runs tbody tr")];
const runs = JSON.parse(document.getElementById("data").textContent);
const filter = document.getElementById("filter");
const compare = document.getElementById("compare");
const chosen = () => rows.filter((row) => row.querySelector("input").checked);

function sortBy(th) {
  const column = th.cellIndex;
  const descending = th.getAttribute("aria-sort") === "ascending";
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const order = new Intl.Collator(undefined, { numeric: true });
  rows.sort((a, b) => order.compare(a.cells[column].textContent, b.cells[column].textContent));
  if (descending) rows.reverse();
  rows[0]?.parentNode.append(...rows);
}

function hideOthers() {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  document.getElementById("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

function element(tag, text = "", of = {}) {
  const made = Object.assign(document.createElement(tag), of);
  made.append(text);
  return made;
}

function shown(value) {
  if (value === undefined) return "–";
  if (typeof value === "string") return value;
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(6))) : JSON.stringify(value);
}

// A table with a column for each run; what differs is bold, and all there is unless `all`.
function table(title, parts, all) {
  const names = [...new Set(parts.flatMap((part) => Object.keys(part)))];
  const differ = (name) => new Set(parts.map((part) => JSON.stringify(part[name]))).size > 1;
  const left = names.filter((name) => all || differ(name));
  const section = element("section");
  section.append(element("h2", title));
  if (!left.length) {
    section.append(element("p", names.length ? "The same in all of them." : "None."));
    return section;
  }
  const body = element("tbody");
  for (const name of left) {
    const row = element("tr", "", { className: differ(name) ? "differs" : "" });
    row.append(element("th", name), ...parts.map((part, i) => {
      const cell = element("td", shown(part[name]));
      cell.dataset.label = runs[chosen()[i].dataset.run].folder;
      return cell;
    }));
    body.append(row);
  }
  const head = element("tr");
  head.append(element("th"), ...chosen().map((row) => element("th", runs[row.dataset.run].folder)));
  const top = element("thead");
  top.append(head);
  const made = element("table", "", { className: "cards" });
  made.append(top, body);
  section.append(made);
  return section;
}

function figures(parts) {
  const section = element("section");
  const names = [...new Set(parts.flatMap((part) => part.figures.map((path) => path.split("/").pop())))];
  if (names.length) section.append(element("h2", "Figures"));
  for (const name of names) {
    const beside = element("div", "", { className: "beside" });
    for (const part of parts) {
      const path = part.figures.find((path) => path.split("/").pop() === name);
      const figure = element("figure");
      if (path) figure.append(element("img", "", { src: path, alt: name }));
      figure.append(element("figcaption", part.folder + (path ? "" : ": none")));
      beside.append(figure);
    }
    section.append(element("h3", name), beside);
  }
  return section;
}

function showComparison() {
  const parts = chosen().map((row) => runs[row.dataset.run]);
  compare.replaceChildren();
  document.getElementById("hint").hidden = parts.length > 1;
  if (parts.length < 2) return;
  compare.append(
    element("h1", `${parts.length} runs beside each other`),
    table("Parameters that differ", parts.map((part) => part.parameters), false),
    table("Numbers", parts.map((part) => part.metrics), true),
    table("Checks", parts.map((part) => part.checks), true),
    figures(parts),
  );
}

for (const th of document.querySelectorAll("#runs th[data-sort]"))
  th.querySelector("button").addEventListener("click", () => sortBy(th));
filter.addEventListener("input", hideOthers);
for (const row of rows) row.querySelector("input").addEventListener("change", showComparison);
const asked = new URLSearchParams(location.hash.slice(1));
for (const folder of asked.getAll("run")) {
  const row = rows.find((row) => runs[row.dataset.run].folder === folder);
  if (row) row.querySelector("input").checked = true;
}
filter.value = asked.get("filter") ?? "";
hideOthers();
showComparison();
