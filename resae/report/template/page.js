"use strict";
(() => {
  const make = (tag, text, set = {}) => Object.assign(document.createElement(tag), { textContent: text }, set);

  // Numbers by size, text by the alphabet, cells without a value last in either direction.
  const compare = (column, numeric, sign) => (a, b) => {
    const [x, y] = [a, b].map((row) => row.cells[column].dataset.value);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
  };

  const sortable = (table) => {
    const body = table.tBodies[0], original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = make("button", "", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
        const order = next === undefined ? "ascending" : next;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        table.toggleAttribute("data-sorted", order !== null);
        let rows = [...original];
        if (order !== null) {
          head.setAttribute("aria-sort", order);
          rows.sort(compare(column, !head.classList.contains("word"), order === "ascending" ? 1 : -1));
        }
        body.append(...rows);
      });
    });
  };

  const filterable = (table) => {
    const rows = [...table.tBodies[0].rows];
    const bar = make("div", "", { className: "filter" });
    const label = make("label", "Filter rows: ");
    const input = make("input", "", { type: "search" });
    input.setAttribute("aria-label", `Filter rows: ${table.caption.textContent}`);
    const status = make("span", "", { className: "quiet" });
    status.setAttribute("role", "status");
    label.append(input);
    bar.append(label, status);
    table.closest(".wide").before(bar);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        const kept = words.every((word) => text.includes(word));
        row.classList.toggle("hidden", !kept);
        shown += kept;
      }
      status.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
  };

  const sections = [...document.querySelectorAll("details.section")];
  const all = (open) => sections.forEach((section) => { section.open = open; });
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.closest("details")) { target.closest("details").open = true; target.scrollIntoView(); }
  };
  document.querySelectorAll("table[data-sortable]").forEach(sortable);
  document.querySelectorAll("table[data-filter]").forEach(filterable);
  const tools = document.querySelector(".tools");
  for (const [text, open] of [["Open all sections", true], ["Close all", false]]) {
    const button = make("button", text, { type: "button" });
    button.addEventListener("click", () => all(open));
    tools.append(button);
  }
  let before = [];
  addEventListener("beforeprint", () => { before = sections.map((section) => section.open); all(true); });
  addEventListener("afterprint", () => sections.forEach((section, i) => { section.open = before[i]; }));
  addEventListener("hashchange", reveal);
  reveal();
})();
