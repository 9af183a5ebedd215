// Sorting and filtering of the tables; what is chosen stands in the address, so that it can be shared.
"use strict";

(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const stored = (name, value) => {
    try {
      if (value === undefined) return localStorage.getItem(name);
      localStorage.setItem(name, value);
    } catch (error) {
      console.debug("nothing is remembered here:", error.message);
    }
    return null;
  };
  const paint = (dark) => {
    root.classList.toggle("dark", dark);
    root.classList.toggle("light", !dark);
    button.setAttribute("aria-pressed", String(dark));
  };
  const chosen = stored("theme");
  paint(chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  button.addEventListener("click", () => {
    const dark = !root.classList.contains("dark");
    paint(dark);
    stored("theme", dark ? "dark" : "light");
  });

  const address = new URLSearchParams(location.hash.slice(1));
  const write = () => {
    for (const [name, value] of [...address]) if (!value) address.delete(name);
    history.replaceState(null, "", address.size ? `#${address}` : location.pathname + location.search);
  };

  const tables = [...document.querySelectorAll("table.sortable")].map((element) => {
    const rows = element.tBodies[0].rows.length;
    const sort = (address.get(`sort.${element.id}`) || "").split(",");
    const known = /^\d+$/.test(sort[0]) && Number(sort[0]) < element.tHead.rows[0].cells.length;
    const table = new DataTable(element, {
      order: known ? [[Number(sort[0]), sort[1] === "desc" ? "desc" : "asc"]] : [],
      paging: rows > 100,
      pageLength: 100,
      info: rows > 100,
      autoWidth: false,
      layout: { topStart: null, topEnd: null, bottomStart: rows > 100 ? "info" : null, bottomEnd: rows > 100 ? "paging" : null },
    });
    table.on("order", () => {
      const order = table.order();
      const [column, direction] = order.length ? [order[0][0] ?? order[0].idx, order[0][1] ?? order[0].dir] : [];
      address.set(`sort.${element.id}`, direction ? `${column},${direction}` : "");
      write();
    });
    return { element, table };
  });

  const form = document.getElementById("filters");
  if (!form) return;
  const apply = () => {
    const search = form.elements.search.value;
    const backbone = form.elements.backbone.value;
    let shown = 0;
    for (const { element, table } of tables.filter(({ element }) => element.closest(".board"))) {
      table.search(search);
      table.column(2).search(backbone, { exact: true });
      table.draw();
      shown += table.rows({ search: "applied" }).count();
      element.closest(".board").hidden = false;
    }
    document.getElementById("shown").textContent = `${shown} rows`;
    address.set("search", search);
    address.set("backbone", backbone);
    write();
  };
  form.elements.search.value = address.get("search") || "";
  form.elements.backbone.value = address.get("backbone") || "";
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
})();
