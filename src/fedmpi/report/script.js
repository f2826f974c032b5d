"use strict";
// Draws the page's charts in the colours of the theme, one after the other; again when theme, width or axis change.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const NARROW = 600;
  const PAPER = 670; // width of a chart in print, which fits A4 and Letter

  function painter() {
    const style = getComputedStyle(document.documentElement);
    return (name) => {
      const [key, alpha] = name.slice(1).split("/");
      const colour = style.getPropertyValue("--" + key).trim();
      if (!alpha) return colour;
      const hex = colour.length === 4 ? colour.replace(/[0-9a-f]/gi, "$&$&") : colour;
      const parts = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
      return `rgba(${parts.join(",")},${alpha})`;
    };
  }

  function painted(value, paint) {
    if (typeof value === "string") return /^\$[a-z]/.test(value) ? paint(value) : value;
    if (Array.isArray(value)) return value.map((v) => painted(v, paint));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, k === "name" ? v : painted(v, paint)]));
    }
    return value;
  }

  function axisOf(box, chart) {
    const names = Object.keys(chart.axes || {});
    if (!names.length) return null;
    const scope = box.closest("section");
    const chosen = scope && scope.querySelector("fieldset input:checked");
    return chosen && names.includes(chosen.value) ? chosen.value : names[0];
  }

  // Names at the ends of lines; they are moved apart where they would overlap.
  function labels(box, traces, colours) {
    const y = box._fullLayout.yaxis;
    const height = y._length;
    const ends = [];
    traces.forEach((trace, i) => {
      if (!trace.label || trace.type !== "scatter") return;
      let last = trace.y.length - 1;
      while (last >= 0 && trace.y[last] === null) last -= 1;
      if (last < 0) return;
      const value = trace.y[last];
      const at = y.d2p(value);
      ends.push({ text: trace.label, at, want: at, colour: colours[i], x: trace.x[last] });
    });
    ends.sort((a, b) => a.at - b.at);
    const gap = 16;
    for (let pass = 0; pass < 40; pass += 1) {
      for (let i = 1; i < ends.length; i += 1) {
        const over = gap - (ends[i].want - ends[i - 1].want);
        if (over > 0) { ends[i].want += over / 2; ends[i - 1].want -= over / 2; }
      }
      if (ends.length) {
        ends[0].want = Math.max(ends[0].want, 4);
        ends[ends.length - 1].want = Math.min(ends[ends.length - 1].want, height - 4);
      }
    }
    return ends.map((end) => ({
      text: end.text, font: { color: end.colour, size: 13 }, showarrow: false, xref: "paper", x: 1, xshift: 8,
      xanchor: "left", yref: "paper", y: 1 - end.want / height, yanchor: "middle", align: "left",
    }));
  }

  function draw(box) {
    const chart = charts[box.dataset.chart];
    const paint = painter();
    const axis = axisOf(box, chart);
    const printing = draw.printing;
    const width = printing ? PAPER : box.clientWidth || 600;
    const narrow = width < NARROW;
    const traces = chart.traces.map((trace) => {
      const { over, ...rest } = trace;
      const found = painted(rest, paint);
      if (over) found.x = over[axis] || over[Object.keys(over)[0]];
      return found;
    });
    const named = traces.filter((t) => t.label);
    const direct = !narrow && named.length > 0 && named.length <= 9;
    const longest = Math.max(0, ...named.map((t) => t.label.length));
    const clean = traces.map(({ label, ...rest }) => (direct && label ? { ...rest, showlegend: false } : rest));
    const shown = clean.filter((t) => t.showlegend !== false && t.name);
    const layout = painted(chart.layout || {}, paint);
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: paint("$ink") },
      margin: { l: 60, r: direct ? Math.min(190, 24 + 7.4 * longest) : 12, t: 10, b: 46 },
      height: box._height, ...(printing ? { width: PAPER } : { autosize: true }), hovermode: "x unified", dragmode: narrow ? false : "zoom",
      hoverlabel: { bgcolor: paint("$panel"), bordercolor: paint("$line"), font: { color: paint("$ink") } },
      showlegend: direct ? shown.length > 0 : clean.filter((t) => t.name).length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.01, yanchor: "bottom", font: { size: 12 }, traceorder: "normal" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: paint("$muted"), activecolor: paint("$ink") },
      ...(clean.some((t) => t.type === "bar") ? { barmode: "stack", bargap: 0.25 } : {}),
    };
    const axes = { gridcolor: paint("$line"), linecolor: paint("$muted"), zeroline: false, automargin: true, ticks: "" };
    const whole = { ...base, ...layout };
    whole.xaxis = { ...axes, showgrid: false, showline: true, ...(layout.xaxis || {}) };
    whole.yaxis = { ...axes, ...(layout.yaxis || {}) };
    const rounds = axis === "round" || (whole.xaxis.title || {}).text === "Round";
    const places = rounds ? traces.flatMap((t) => t.x || []) : [];
    if (places.length && Math.max(...places) - Math.min(...places) < 10) whole.xaxis.dtick = 1; // there is no round 1.5
    for (const one of [whole.xaxis, whole.yaxis]) if (one.showgrid === false) delete one.gridcolor;
    if (axis && chart.axes[axis]) whole.xaxis.title = { text: chart.axes[axis] };
    // The legend stands above the plot; how many lines it takes depends on the width.
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = `12px ${base.font.family}`;
    const widths = shown.map((t) => pen.measureText(t.name).width + 50); // with the sample and the gaps
    const room = width - whole.margin.l - whole.margin.r;
    const inLine = widths.reduce((a, b) => a + b, 0) <= room ? shown.length : Math.max(1, Math.floor(room / Math.max(...widths)));
    const lines = whole.showlegend && shown.length ? Math.ceil(shown.length / inLine) : 0;
    whole.height = (box._height || 340) + 22 * lines;
    whole.margin = { ...whole.margin, t: whole.margin.t + 22 * lines };
    box.style.height = whole.height + "px";
    const config = {
      responsive: true, displaylogo: false, displayModeBar: printing || !matchMedia("(hover: hover)").matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: box.dataset.chart },
    };
    return Plotly.react(box, clean, whole, config).then(() => {
      if (!direct) return null;
      const colours = traces.map((t) => t.line && t.line.color);
      const marks = labels(box, traces, colours);
      const kept = (layout.annotations || []).concat(marks);
      return Plotly.relayout(box, { annotations: kept });
    });
  }

  function visible() {
    return [...document.querySelectorAll(".chart")].filter((box) => box.offsetParent !== null);
  }

  function drawAll(boxes) {
    const rest = [...boxes];
    const next = () => {
      const box = rest.shift();
      if (!box) { document.documentElement.dataset.drawn = "yes"; return; }
      box._height = box._height || parseInt(box.style.height, 10);
      draw(box).then(() => setTimeout(next, 0));
    };
    next();
  }

  for (const fold of document.querySelectorAll("details.fold")) {
    fold.addEventListener("toggle", () => fold.open && drawAll([...fold.querySelectorAll(".chart:empty")]));
  }
  for (const input of document.querySelectorAll("fieldset input")) {
    input.addEventListener("change", () => drawAll([...input.closest("section").querySelectorAll(".chart")]));
  }
  // A link to a part behind a closed heading opens it.
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = target && target.closest("details.fold");
    if (fold && !fold.open) { fold.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", reveal);
  dark.addEventListener("change", () => drawAll(visible()));
  let before = innerWidth;
  addEventListener("resize", () => {
    if ((before < NARROW) !== (innerWidth < NARROW)) drawAll(visible());
    before = innerWidth;
  });
  addEventListener("beforeprint", () => { draw.printing = true; visible().forEach(draw); });
  addEventListener("afterprint", () => { draw.printing = false; drawAll(visible()); });
  drawAll(visible());
  reveal();
})();
