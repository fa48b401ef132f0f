"use strict";
(async () => {
  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }
  const data = await unpacked("data");
  data.rollouts = [];

  // Elements are made of text nodes alone: nothing in the data is ever read as markup.
  function make(tag, options = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "class") element.className = value;
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const number = (x) => {
    if (x === null || x === undefined) return "-";
    const size = Math.abs(x);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return x.toExponential(1);
    return size >= 1000 ? Math.round(x).toLocaleString("en") : String(+x.toPrecision(3));
  };

  const prose = (words) => words.split("`").map((part, i) => i % 2 ? make("code", {}, part) : part);

  // Curves

  const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
  const several = data.runs.length > 1;
  const charts = new Set();
  let zoom = null, smoothing = 0.6, setting = false;

  function smoothed(values, weight) {
    let sum = 0, mass = 0;
    return values.map((x) => {
      if (x === null || x === undefined) return x;
      sum = weight * sum + (1 - weight) * x;
      mass = weight * mass + 1 - weight;
      return sum / mass;
    });
  }

  function lines(panel) {
    const found = [];
    panel.metrics.forEach((name, i) => data.curves.forEach((run, r) => {
      const curve = run.metrics[name];
      if (!curve) return;
      const label = !several ? name : panel.metrics.length > 1 ? `${data.runs[r]}: ${name}` : data.runs[r];
      found.push({ label, x: run.steps[curve[0]], y: curve[1], color: `c${(several ? r : i) % 8}`, dash: several ? DASHES[i % 4] : [] });
    }));
    return found;
  }

  function range(panel, own) {
    const values = own.flatMap((line) => line.y);
    let low = Math.min(...values), high = Math.max(...values);
    const [least, most] = panel.healthy; // a bound is shown where the curve is beyond it
    if (least !== null && low < least) high = Math.max(high, least);
    if (most !== null && high > most) low = Math.min(low, most);
    const space = (high - low || Math.abs(high) || 1) * 0.06;
    const [start, end] = panel.axis;
    return [start !== null ? Math.min(start, low) : low - space, end !== null ? Math.max(end, high) : high + space];
  }

  function band(panel) {
    return (chart) => {
      const [low, high] = panel.healthy, { ctx, bbox, scales } = chart;
      if (low === null && high === null) return;
      const at = (value, end) => value === null ? end : Math.min(bbox.top + bbox.height, Math.max(bbox.top, chart.valToPos(value, "y", true)));
      const top = at(high, bbox.top), bottom = at(low, bbox.top + bbox.height);
      ctx.save();
      ctx.fillStyle = color("band");
      ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
      ctx.strokeStyle = color("band-line");
      ctx.setLineDash([4, 4]);
      for (const value of [low, high]) {
        if (value === null || value < scales.y.min || value > scales.y.max) continue;
        const y = chart.valToPos(value, "y", true);
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
      }
      ctx.restore();
    };
  }

  // The numbers themselves, faint behind the smoothed curve.
  function raw(own) {
    return (chart) => {
      const { ctx, bbox } = chart;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      ctx.globalAlpha = 0.28;
      own.forEach((line, i) => {
        if (!chart.series[i + 1].show) return;
        ctx.strokeStyle = color(line.color);
        ctx.beginPath();
        line.x.forEach((x, k) => ctx[k ? "lineTo" : "moveTo"](chart.valToPos(x, "x", true), chart.valToPos(line.y[k], "y", true)));
        ctx.stroke();
      });
      ctx.restore();
    };
  }

  function zoomed(chart) {
    if (setting) return;
    const { min, max } = chart.scales.x;
    setting = true;
    zoom = min <= chart.data[0][0] && max >= chart.data[0][chart.data[0].length - 1] ? null : [min, max];
    charts.forEach((other) => { if (other !== chart) applyZoom(other); });
    setting = false;
  }
  function applyZoom(chart) {
    const xs = chart.data[0];
    chart.setScale("x", zoom ? { min: zoom[0], max: zoom[1] } : { min: xs[0], max: xs[xs.length - 1] });
  }

  function draw(panel, place) {
    const own = lines(panel), smooths = panel.smoothed && smoothing > 0;
    const shown = own.map((line) => smooths ? { ...line, y: smoothed(line.y, smoothing) } : line);
    const limits = range(panel, own);
    const axis = { stroke: () => color("soft"), grid: { stroke: () => color("line"), width: 1 }, ticks: { stroke: () => color("line"), width: 1 }, font: "11px system-ui" };
    const values = (chart, ticks) => ticks.map(number);
    const options = {
      width: place.clientWidth || 340, height: 190,
      scales: { x: { time: false }, y: { range: () => limits } },
      axes: [{ ...axis, size: 28, values }, { ...axis, size: 52, values }],
      series: [
        { label: "step", value: (chart, x) => number(x) },
        ...shown.map((line) => ({ label: line.label, stroke: () => color(line.color), width: 1.6, dash: line.dash, spanGaps: true, points: { show: line.x.length < 15, size: 5 }, value: (chart, y) => number(y) })),
      ],
      cursor: { sync: { key: "step", setSeries: false }, drag: { x: true, y: false }, points: { size: 6 } },
      legend: { markers: { width: 1 } },
      hooks: { setCursor: [(chart) => { if (chart.cursor.idx === null || chart.cursor.idx === undefined) last(chart); }], drawAxes: [band(panel), ...(smooths ? [raw(own)] : [])], setScale: [(chart, key) => { if (key === "x" && charts.has(chart)) zoomed(chart); }] },
    };
    const last = (chart) => chart.setLegend({ idxs: chart.data.map((values) => { let i = values.length - 1; while (i > 0 && (values[i] === null || values[i] === undefined)) i--; return i; }) }, false);
    const chart = new uPlot(options, uPlot.join(shown.map((line) => [line.x, line.y])), place);
    setting = true;
    if (zoom) applyZoom(chart);
    setting = false;
    last(chart);
    charts.add(chart);
    place.chart = chart;
  }

  function erase(place) {
    if (!place.chart) return;
    charts.delete(place.chart);
    place.chart.destroy();
    place.chart = null;
  }

  function bounds([low, high]) {
    if (low === null && high === null) return "";
    return low === null ? `healthy up to ${number(high)}` : high === null ? `healthy from ${number(low)}` : `healthy ${number(low)} to ${number(high)}`;
  }

  const places = [];
  function drawOpen() {
    for (const place of places) if (!place.chart && place.clientWidth > 0) draw(place.panel, place);
  }
  for (const section of data.sections) {
    const grid = make("div", { class: "panels" });
    for (const panel of section.panels) {
      const place = make("div");
      place.panel = panel;
      places.push(place);
      const healthy = bounds(panel.healthy);
      const note = make("p", { class: "note", title: [panel.meaning, panel.unhealthy].filter(Boolean).join(". ") || null }, make("span", { class: "healthy" }, healthy), healthy && panel.meaning ? ": " : "", ...prose(panel.meaning));
      grid.append(make("div", { class: "panel", "data-words": `${panel.title} ${panel.metrics.join(" ")}`.toLowerCase() }, make("h4", {}, panel.title), note, place));
    }
    document.getElementById("panels").append(make("details", { open: section === data.sections[0], ontoggle: drawOpen }, make("summary", {}, make("h3", {}, section.name), ` ${section.panels.length}`), grid));
  }
  drawOpen();
  function redraw() {
    places.filter((place) => place.chart).forEach((place) => { erase(place); draw(place.panel, place); });
  }
  function filter(words) {
    for (const panel of document.querySelectorAll(".panel")) panel.hidden = !panel.dataset.words.includes(words.toLowerCase());
    for (const section of document.querySelectorAll("#panels details")) {
      section.hidden = !section.querySelector(".panel:not([hidden])");
      if (words && !section.hidden) section.open = true;
    }
  }
  document.getElementById("curve-controls").append(
    make("label", {}, "find ", make("input", { type: "search", placeholder: "kl, reward ...", size: 14, oninput: (event) => filter(event.target.value) })),
    make("label", {}, "smoothing ", make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: smoothing, oninput: (event) => { smoothing = +event.target.value; redraw(); } })),
    make("span", { class: "note" }, "drag to zoom all curves, double-click to go back"),
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let resizing;
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => places.forEach((place) => place.chart && place.chart.setSize({ width: place.clientWidth, height: 190 })), 120); });

  // Completions

  const HEATS = { advantage: "advantage", kl: "KL to the reference", logp: "log-prob" };
  const state = { run: 0, step: 0, heat: "advantage", dropped: true };

  function decoded(numbers) {
    if (!numbers) return null;
    const raw = atob(numbers.data);
    return Array.from(raw, (c) => { const q = (c.charCodeAt(0) << 24) >> 24; return q === -128 ? null : q * numbers.scale / 127; });
  }

  // Log-probs are all negative: the less likely a token, the stronger. Others are red below 0 and blue above.
  function tint(x, most, heat) {
    const strength = Math.min(1, Math.abs(x) / (most || 1)), alpha = (0.08 + 0.62 * strength) * (x !== 0);
    const hue = heat === "logp" ? "190, 120, 0" : x > 0 ? "37, 110, 220" : "220, 60, 40";
    return `rgba(${hue}, ${alpha.toFixed(3)})`;
  }

  function completion(row, most) {
    const values = decoded(row[state.heat]);
    const body = make("div", { class: "tokens", dir: "auto" });
    row.pieces.forEach((piece, i) => {
      const x = values ? values[i] : null;
      const tool = row.mask && row.mask[i] === "0";
      const span = make("span", { class: tool ? "tool" : null, title: x === null || x === undefined || tool ? null : `${HEATS[state.heat]} ${number(x)}` }, piece);
      if (x !== null && x !== undefined && !tool) span.style.background = tint(x, most, state.heat);
      body.append(span);
    });
    if (row.left_out) body.append(make("span", { class: "tool" }, ` ... ${row.left_out} more tokens`));
    return body;
  }

  function rowOf(row, most) {
    const facts = Object.entries(row.rewards).map(([label, x]) => make("span", {}, `${label} `, make("b", {}, number(x))));
    if (row.total !== null && Object.keys(row.rewards).length > 1) facts.push(make("span", {}, "total ", make("b", {}, number(row.total))));
    facts.push(make("span", {}, `${row.pieces.length + (row.left_out || 0)} tokens`), make("span", {}, row.finish === "stop" ? "ended" : row.finish === "length" ? "cut off" : row.finish));
    facts.push(row.dropped ? make("span", { class: "out" }, `dropped: ${row.dropped}`) : make("span", { class: "kept" }, "kept"));
    return make("div", { class: row.dropped ? "row dropped" : "row" }, make("div", { class: "numbers-line" }, ...facts), completion(row, most));
  }

  function content(value) {
    if (typeof value === "string") return value;
    if (Array.isArray(value)) return value.map((part) => part && typeof part.text === "string" ? part.text : JSON.stringify(part)).join("\n");
    return JSON.stringify(value, null, 1);
  }

  function promptOf(prompt) {
    if (!Array.isArray(prompt)) return make("div", { class: "prompt", dir: "auto" }, content(prompt));
    return make("div", { class: "prompt" }, ...prompt.map((message) => {
      const { role, content: said, ...rest } = message;
      const more = Object.keys(rest).length ? `\n${JSON.stringify(rest, null, 1)}` : "";
      return make("div", { class: "message", dir: "auto" }, make("span", { class: "role" }, String(role)), content(said ?? "") + more);
    }));
  }

  function choice(label, options, chosen, pick) {
    return make("span", { class: "choice" }, label, ...options.map(([value, name]) => make("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => { pick(value); browse(); } }, name)));
  }

  function browse() {
    const out = document.getElementById("rollouts");
    if (!out) return;
    const steps = data.rollouts[state.run] || [], step = steps[state.step];
    const controls = document.getElementById("rollout-controls");
    if (!step) { out.replaceChildren(make("p", { class: "note" }, "The completions would not fit into this file: they are in completions/.")); return; }
    const rows = step.groups.flatMap((group) => group.rows);
    const heats = Object.keys(HEATS).filter((heat) => rows.some((row) => row[heat]));
    if (state.heat !== "none" && !heats.includes(state.heat)) state.heat = heats[0] || "none";
    const most = Math.max(0, ...rows.map((row) => row[state.heat] ? row[state.heat].scale : 0));
    const gone = rows.filter((row) => row.dropped).length;
    controls.replaceChildren(
      ...(several ? [choice("run", data.runs.map((name, i) => [i, name]).filter(([i]) => data.rollouts[i].length), state.run, (i) => { state.run = i; state.step = Math.min(state.step, data.rollouts[i].length - 1); })] : []),
      choice("policy after step", steps.map((each, i) => [i, each.step]), state.step, (i) => { state.step = i; }),
      choice("color", [...heats.map((heat) => [heat, HEATS[heat]]), ["none", "none"]], state.heat, (heat) => { state.heat = heat; }),
      ...(heats.length && state.heat !== "none" ? [scale(most)] : []),
      ...(gone ? [choice("dropped", [[true, "show"], [false, "hide"]], state.dropped, (show) => { state.dropped = show; })] : []),
    );
    out.replaceChildren(...step.groups.map((group, i) => make("div", { class: "group" },
      make("h3", {}, `Prompt ${i + 1}`), promptOf(group.prompt),
      group.reference === null ? null : make("p", { class: "reference" }, make("span", { class: "note" }, "reference "), make("bdi", {}, group.reference)),
      ...group.rows.filter((row) => state.dropped || !row.dropped).map((row) => rowOf(row, most)),
    )));
  }

  function scale(most) {
    const canvas = make("canvas", { width: 120, height: 10 }), ctx = canvas.getContext("2d"), low = -most, high = state.heat === "logp" ? 0 : most;
    for (let i = 0; i < 120; i++) {
      ctx.fillStyle = tint(low + (high - low) * i / 119, most, state.heat);
      ctx.fillRect(i, 0, 1, 10);
    }
    return make("span", { class: "scale" }, number(low), canvas, number(high));
  }
  document.documentElement.dataset.ready = "";

  // The curves are on the screen before the completions, which may be megabytes, are read.
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  data.rollouts = await unpacked("rollout-data");
  state.run = Math.max(0, data.rollouts.findIndex((steps) => steps.length));
  state.step = Math.max(0, (data.rollouts[state.run] || []).length - 1);
  browse();
  document.documentElement.dataset.complete = "";
})();
