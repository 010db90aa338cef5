// Tables sorted by the column whose head is pressed; rows without a value stay last.
"use strict";
document.querySelectorAll("[data-sort]").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const rising = head.getAttribute("aria-sort") !== "ascending";
    head.parentElement.querySelectorAll("[aria-sort]").forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const value = (row) => row.cells[head.cellIndex].dataset.value;
    const order = (one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      const compared = button.dataset.sort === "number" ? Number(a) - Number(b) : a.localeCompare(b);
      return rising ? compared : -compared;
    };
    body.append(...Array.from(body.rows).sort(order));
  });
});
