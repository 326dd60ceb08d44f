"use strict";
(() => {
  const PAGE = 50;
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const data = JSON.parse(byId("data").textContent);

  /* Figures name colours as CSS variables; they are looked up at drawing time, so that light and dark both fit. */
  const resolve = (value, css) => {
    if (Array.isArray(value)) return value.map((item) => resolve(item, css));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) =>
        [key, /^(hover|tick)?text$/.test(key) ? item : resolve(item, css)]));
    return /^--[a-z0-9]+$/.test(value) ? css.getPropertyValue(value).trim() || value : value;
  };

  const draw = () => {
    const css = getComputedStyle(root);
    return Promise.all(Object.entries(data.figures).map(([name, figure]) => {
      const place = byId("plot-" + name);
      if (!place.classList.contains("js-plotly-plot")) place.replaceChildren();
      const { data: traces, layout } = resolve(figure, css);
      return Plotly.react(place, traces, layout, { responsive: true, displayModeBar: false });
    }));
  };

  const unpack = async () => {
    const packed = Uint8Array.from(atob(byId("plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(plain).text();
    document.head.append(script);
  };

  const plots = async () => {
    if (byId("plotly")) {
      await unpack();
      await draw();
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    }
  };

  const table = () => {
    if (!byId("rows")) return;
    const { rows, binary } = data.examples;
    const labels = [...document.querySelectorAll("#rows th")].map((th) => th.textContent);
    const state = { kind: "all", text: "", page: 0 };

    const cell = (row, text, label, score) => {
      const td = document.createElement("td");
      const span = document.createElement("span");
      td.dataset.label = label;
      span.textContent = text || "(empty)";
      if (!text) span.className = "empty";
      if (score !== undefined && score !== null) {
        if (binary) td.className = score === 1 ? "right" : "wrong";
      }
      td.append(span);
      if (score !== undefined && score !== null && !binary) {
        const small = document.createElement("small");
        small.textContent = "score " + score.toFixed(3);
        td.append(small);
      }
      row.append(td);
    };

    const show = () => {
      const wanted = state.text.toLowerCase();
      const found = rows.filter((r) => (state.kind === "all" || r[0] === state.kind) &&
        (!wanted || r.slice(1, 6).some((text) => text.toLowerCase().includes(wanted))));
      const pages = Math.max(1, Math.ceil(found.length / PAGE));
      state.page = Math.min(state.page, pages - 1);
      const from = state.page * PAGE;
      const body = byId("rows").tBodies[0];
      body.replaceChildren(...found.slice(from, from + PAGE).map(([, id, prompt, reference, base, chosen, a, b]) => {
        const tr = document.createElement("tr");
        tr.title = id;
        cell(tr, prompt, labels[0]);
        cell(tr, reference, labels[1]);
        cell(tr, base, labels[2], a);
        if (labels.length > 3) cell(tr, chosen, labels[3], b);
        tr.addEventListener("click", () => tr.classList.toggle("open"));
        return tr;
      }));
      byId("range").textContent = found.length
        ? `${from + 1}–${Math.min(from + PAGE, found.length)} of ${found.length.toLocaleString("en")}` : "none";
      byId("prev").disabled = state.page === 0;
      byId("next").disabled = state.page >= pages - 1;
      for (const button of document.querySelectorAll("button[data-kind]"))
        button.setAttribute("aria-pressed", String(button.dataset.kind === state.kind));
    };

    const set = (change) => { Object.assign(state, change); show(); };
    for (const button of document.querySelectorAll("button[data-kind]"))
      button.addEventListener("click", () => set({ kind: button.dataset.kind, page: 0 }));
    byId("find").addEventListener("input", (event) => set({ text: event.target.value, page: 0 }));
    byId("prev").addEventListener("click", () => set({ page: state.page - 1 }));
    byId("next").addEventListener("click", () => set({ page: state.page + 1 }));
    show();
  };

  table();
  plots().catch(() => {
    for (const note of document.querySelectorAll(".waiting"))
      note.textContent = "This browser is too old for the plot; the figures stand in the tables.";
  }).finally(() => {
    /* For checking: how far the page is wider than the window, in pixels. */
    root.dataset.overflow = root.scrollWidth - root.clientWidth;
    root.dataset.ready = "yes";
  });
})();
