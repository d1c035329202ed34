// Filters above the forest plot of the scoreboard. Without scripts the plot is whole.
document.addEventListener("DOMContentLoaded", () => {
  const plots = [...document.querySelectorAll(".forest")];
  if (!plots.length) return;
  const rows = plots.flatMap((plot) => [...plot.querySelectorAll("tbody tr")]);
  const chapterOf = (row) => row.cells[0].textContent.trim().split(".")[0];
  const verdictsOf = (row) => [...row.querySelectorAll(".verdict")].map((mark) => mark.textContent.trim());
  const chosen = {};
  const filters = document.createElement("div");
  filters.className = "filters";
  const add = (name, values) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    for (const value of ["all", ...values]) select.add(new Option(value));
    select.addEventListener("change", () => {
      chosen[name] = select.value === "all" ? null : select.value;
      for (const row of rows) {
        const other = chosen.chapter && chapterOf(row) !== chosen.chapter;
        row.hidden = other || (chosen.verdict && !verdictsOf(row).includes(chosen.verdict));
      }
      for (const plot of plots) {
        plot.closest("section").hidden = [...plot.querySelectorAll("tbody tr")].every((row) => row.hidden);
      }
    });
    label.append(`${name} `, select);
    filters.append(label);
  };
  add("chapter", [...new Set(rows.map(chapterOf))]);
  add("verdict", [...new Set(rows.flatMap(verdictsOf))].sort());
  plots[0].closest("section").before(filters);
});
