"use strict";
// The data is in the page: rows of models, columns of numbers, records of training, curves over positions.
const content = JSON.parse(document.getElementById("content").textContent);
const COLOURS = ["#2a78d6", "#d95926", "#2e9e63", "#a05cc4", "#8d7a2e", "#c2477f", "#1f9aa8", "#7d7f86"];
// With more models than colours, lines and bars tell those of one colour apart.
const DASHES = ["solid", "dash", "dot", "dashdot"];
const PATTERNS = ["", "/", ".", "x"];
// Plotly's button to share a chart would send it to somebody's server.
const CONFIG = {
  displaylogo: false, responsive: true, plotlyServerURL: "", showSendToCloud: false,
  modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d"],
};
const columns = new Map(content.columns.map((column) => [column.key, column]));
const state = {
  filter: "", sort: null, descending: false, shape: "bars",
  drawn: new Set(content.rows.map((row) => row.id)),
  shown: new Set(content.columns.filter((column) => column.main).map((column) => column.key)),
};
if (state.shown.size === 0) content.columns.forEach((column) => state.shown.add(column.key));

const byId = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// ---------------------------------------------------------------- rows and columns

function visible() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = content.rows.filter((row) => {
    const text = `${row.name} ${row.about}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (state.sort === null) return rows;
  const sign = state.descending ? -1 : 1;
  const value = (row) => (state.sort === "name" ? row.name : row.numbers[state.sort]?.value);
  return rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // missing last
    if (state.sort === "name") return sign * x.localeCompare(y, "en", { numeric: true });
    return sign * (x - y);
  });
}

const drawnRows = () => visible().filter((row) => state.drawn.has(row.id));
const place = (row) => content.rows.indexOf(row);
const colour = (row) => COLOURS[place(row) % COLOURS.length];
const round = (row) => Math.floor(place(row) / COLOURS.length) % DASHES.length;
const dash = (row) => DASHES[round(row)];
const inTable = () => content.columns.filter((column) => state.shown.has(column.key));

function title(column) {
  const way = column.protocols > 1 ? ` (way ${column.protocol_number})` : "";
  return `${column.task} ${column.metric}${way}`;
}

function text(column, value) {
  if (column.unit === "%") return value.toFixed(1);
  if (column.unit === "s" || column.unit === "per min") return value.toFixed(2);
  const signed = column.metric.startsWith("difference") && value > 0 ? "+" : "";
  return signed + value.toFixed(4);
}

// ---------------------------------------------------------------- table

function header(key, label, small) {
  const sorted = state.sort === key;
  const button = element("button", { type: "button", textContent: label + (sorted ? (state.descending ? " ▾" : " ▴") : "") });
  button.addEventListener("click", () => {
    // The first click puts the best on top.
    const column = columns.get(key);
    state.descending = sorted ? !state.descending : column?.better === "higher";
    state.sort = key;
    update();
  });
  const cell = element("th", { className: key === "name" ? "" : "number", scope: "col" }, button);
  if (small) cell.append(element("small", { textContent: small }));
  cell.setAttribute("aria-sort", sorted ? (state.descending ? "descending" : "ascending") : "none");
  return cell;
}

function tableCell(column, number) {
  const cell = element("td", { className: "number" });
  if (number === undefined) return cell;
  cell.append(text(column, number.value));
  if (number.low !== null) {
    cell.append(element("small", { textContent: `${text(column, number.low)} to ${text(column, number.high)}` }));
  }
  if (number.partial) cell.append(element("small", { className: "partial", textContent: "partial" }));
  cell.title = [number.source, number.n === null ? "" : `n = ${number.n}`, number.partial].filter(Boolean).join("\n");
  return cell;
}

function drawTable() {
  const shown = inTable();
  const head = element("tr", {}, header("name", "model", ""));
  for (const column of shown) {
    const small = element("span", { className: "partial", textContent: column.partial ? " partial" : "" });
    const cell = header(column.key, title(column), [column.unit, column.better && `${column.better} is better`].filter(Boolean).join(", "));
    cell.append(small);
    head.append(cell);
  }
  const rows = visible().map((row) => {
    const tick = element("input", { type: "checkbox", checked: state.drawn.has(row.id) });
    tick.setAttribute("aria-label", `draw ${row.name}`);
    tick.addEventListener("change", () => {
      state.drawn[tick.checked ? "add" : "delete"](row.id);
      drawCharts();
    });
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = colour(row);
    const name = element("td", { title: row.about }, tick, swatch, row.name);
    return element("tr", {}, name, ...shown.map((column) => tableCell(column, row.numbers[column.key])));
  });
  byId("models").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  const partial = visible().filter((row) => row.sources.some((source) => source.partial)).length;
  byId("shown").textContent = `${rows.length} of ${content.rows.length} models${partial ? `, ${partial} with partial results` : ""}`;
}

function drawAll(wanted) {
  for (const row of visible()) state.drawn[wanted ? "add" : "delete"](row.id);
  update();
}

function drawChoices() {
  const groups = Map.groupBy(content.columns, (column) => column.group);
  for (const [group, members] of groups) {
    byId("columns").append(element("h3", { textContent: group }));
    for (const column of members) {
      const tick = element("input", { type: "checkbox", checked: state.shown.has(column.key) });
      tick.addEventListener("change", () => {
        state.shown[tick.checked ? "add" : "delete"](column.key);
        update();
      });
      const partial = column.partial ? `, partial: ${column.partial}` : "";
      byId("columns").append(element("label", {}, tick, ` ${title(column)}${partial}`));
    }
  }
}

// ---------------------------------------------------------------- CSV

function quoted(value) {
  const plain = String(value ?? "");
  // A name that begins like a formula must not become one in a spreadsheet.
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(plain) ? `'${plain}` : plain;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function csv() {
  const shown = inTable();
  const head = ["model", "run", "step", "sha256"];
  for (const column of shown) {
    const unit = column.unit ? ` [${column.unit}]` : "";
    const partial = column.partial ? ` (partial: ${column.partial})` : "";
    head.push(`${title(column)}${unit}${partial}`, `${title(column)} low`, `${title(column)} high`);
  }
  const lines = visible().map((row) => {
    const cells = [row.name, row.run, row.step, row.sha256];
    for (const column of shown) {
      const number = row.numbers[column.key];
      cells.push(number?.value, number?.low, number?.high);
    }
    return cells;
  });
  return [head, ...lines].map((cells) => cells.map(quoted).join(",")).join("\r\n") + "\r\n";
}

function download() {
  const link = element("a", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "report.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---------------------------------------------------------------- charts

function layout(rest) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line, faint] = ["--text", "--line", "--faint"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const own = { xaxis: { ...axis, ...rest.xaxis }, yaxis: { ...axis, ...rest.yaxis } };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif" },
    margin: { t: 36, r: 20 }, height: 420, modebar: { bgcolor: "rgba(0,0,0,0)", color: faint, activecolor: ink }, hoverlabel: { namelength: -1 }, legend: { font: { size: 11 } },
    ...rest, ...own,
  };
}

function bounds(numbers) {
  return {
    type: "data", symmetric: false, thickness: 1.2, width: 3, color: layout({}).font.color,
    array: numbers.map((n) => (n?.high ?? n?.value) - n?.value), arrayminus: numbers.map((n) => n?.value - (n?.low ?? n?.value)),
  };
}

function drawSuites() {
  const suites = content.columns.filter((column) => column.chance !== null && column.main);
  byId("suites-section").hidden = suites.length === 0;
  if (suites.length === 0) return;
  const names = suites.map((column) => title(column).replace(/ acc\b/, "") + (column.partial ? " (partial)" : ""));
  const rows = drawnRows().filter((row) => suites.some((column) => row.numbers[column.key]));
  byId("radar").hidden = suites.length < 3; // two are a line
  const radar = state.shape === "radar" && suites.length >= 3;
  const traces = rows.map((row) => {
    const numbers = suites.map((column) => row.numbers[column.key]);
    const values = numbers.map((n) => n?.value ?? null);
    if (!radar) return { type: "bar", name: row.name, x: names, y: values, marker: { color: colour(row), pattern: { shape: PATTERNS[round(row)] } }, error_y: bounds(numbers) };
    return {
      type: "scatterpolar", name: row.name, theta: [...names, names[0]], r: [...values, values[0]], connectgaps: false,
      line: { color: colour(row), dash: dash(row) },
    };
  });
  const line = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 50, y1: 50, line: { color: "#999", dash: "dot", width: 1 } };
  const grid = layout({}).xaxis.gridcolor;
  Plotly.react("suites", traces, layout(radar
    ? { showlegend: true, polar: { bgcolor: "rgba(0,0,0,0)", radialaxis: { range: [0, 100], gridcolor: grid, angle: 90 }, angularaxis: { gridcolor: grid } } }
    : { showlegend: true, barmode: "group", yaxis: { title: { text: "accuracy (%)" }, range: [0, 100] }, shapes: [line] }), CONFIG);
}

// Evaluations while training record of themselves whether they saw all.
function isPartial(run, name) {
  const said = run.records[`${name.split("/")[0]}/partial`];
  return name in run.records && said !== undefined && said[1].some((value) => value > 0);
}

function curveNames() {
  const names = new Map();
  for (const run of content.runs) {
    for (const name of Object.keys(run.records).filter((one) => !one.endsWith("/partial"))) {
      const partial = content.runs.some((other) => isPartial(other, name)) ? " (partial)" : "";
      names.set(name, `${name.replace("/", ": ")}, as recorded${partial}`);
    }
  }
  for (const column of content.columns) {
    const steps = content.rows.filter((row) => row.step !== null && row.numbers[column.key]);
    if (steps.length > 0) names.set(column.key, `${title(column)}, of checkpoints${column.partial ? " (partial)" : ""}`);
  }
  return names;
}

function ofCheckpoints(column) {
  const rows = drawnRows().filter((row) => row.run !== null && row.step !== null && row.numbers[column.key]);
  return [...Map.groupBy(rows, (row) => row.run).values()].map((members) => {
    const ordered = members.toSorted((a, b) => a.step - b.step);
    const numbers = ordered.map((row) => row.numbers[column.key]);
    return {
      name: ordered[0].name.replace(/, step .*/, ""), x: ordered.map((row) => row.step), y: numbers.map((n) => n.value),
      error_y: bounds(numbers), mode: "lines+markers", line: { color: colour(ordered[0]), dash: dash(ordered[0]) },
    };
  });
}

function asRecorded(name) {
  const drawn = new Map(drawnRows().map((row) => [row.run, row]).reverse());
  return content.runs.filter((run) => drawn.has(run.run) && run.records[name]).map((run) => {
    const [steps, values] = run.records[name];
    const row = content.rows.find((row) => row.run === run.run);
    return { name: run.name, x: steps, y: values, mode: steps.length > 60 ? "lines" : "lines+markers", line: { color: colour(row), dash: dash(row) } };
  });
}

function drawCurves() {
  const name = byId("curve").value;
  byId("curves-section").hidden = name === "";
  if (name === "") return;
  const column = columns.get(name);
  const traces = column ? ofCheckpoints(column) : asRecorded(name);
  const label = column ? [title(column), column.unit && `(${column.unit})`].filter(Boolean).join(" ") : name.replace("/", ": ");
  const last = Math.max(0, ...traces.flatMap((trace) => trace.x));
  const xaxis = { title: { text: "step" }, rangemode: "tozero", ...(last <= 10 ? { dtick: 1 } : {}) };
  Plotly.react("curves", traces, layout({ showlegend: true, xaxis, yaxis: { title: { text: label } } }), CONFIG);
}

function lineNames() {
  return [...new Set(content.rows.flatMap((row) => Object.keys(row.curves?.lines ?? {})))];
}

// 1, 2, 5, 10, ... in frames, or 1, 10, ... where these are many; each with its time below.
function positions(rows) {
  const last = Math.max(1, ...rows.flatMap((row) => row.curves.frames));
  const rates = [...new Set(rows.map((row) => row.curves.frame_rate))];
  const tickvals = [];
  for (let decade = 1; decade <= last; decade *= 10) {
    tickvals.push(...(last > 1000 ? [decade] : [decade, 2 * decade, 5 * decade]));
  }
  const time = (seconds) => (seconds < 120 ? `${+seconds.toPrecision(2)} s` : `${+(seconds / 60).toPrecision(2)} min`);
  const below = (frames) => (rates.length === 1 ? `<br>${time(frames / rates[0])}` : "");
  return { tickangle: 0, tickvals, ticktext: tickvals.map((frames) => frames.toLocaleString("en") + below(frames)) };
}

function drawOverlay() {
  const [name, stream] = [byId("line").value, byId("stream").value];
  byId("overlay-section").hidden = name === "";
  if (name === "") return;
  const rows = drawnRows().filter((row) => row.curves?.lines[name]);
  const traces = [];
  const reaches = new Set();
  for (const row of rows) {
    const points = row.curves.lines[name][stream];
    const x = row.curves.frames;
    const band = { x, mode: "lines", line: { width: 0 }, legendgroup: row.id, showlegend: false, hoverinfo: "skip" };
    traces.push({ ...band, y: points.map((p) => p[1]) });
    traces.push({ ...band, y: points.map((p) => p[2]), fill: "tonexty", fillcolor: `${colour(row)}22` });
    traces.push({
      name: row.name + (row.curves.partial ? " (partial)" : ""), x, y: points.map((p) => p[0]), mode: "lines+markers",
      legendgroup: row.id, line: { color: colour(row), dash: dash(row) },
    });
    reaches.add(row.curves.reaches[name]);
  }
  const ink = layout({}).font.color;
  const shapes = [...reaches].filter((reach) => reach > 0).map((reach) => ({
    type: "line", x0: reach, x1: reach, yref: "paper", y0: 0, y1: 1, line: { color: ink, dash: "dashdot", width: 1 },
  }));
  const annotations = [...reaches].filter((reach) => reach > 0).map((reach) => ({
    x: Math.log10(reach), yref: "paper", y: 1, yanchor: "bottom", showarrow: false, font: { size: 11 },
    text: `receptive field ${reach.toLocaleString("en")}`,
  }));
  const difference = name.includes(" - ");
  Plotly.react("overlay", traces, layout({
    showlegend: true, shapes, annotations,
    xaxis: { title: { text: "position (frames, time)" }, type: "log", ...positions(rows) },
    yaxis: { title: { text: `${difference ? "difference of NLL" : "NLL"} (nats a code)` }, zeroline: difference },
  }), CONFIG);
  const said = rows.filter((row) => row.curves.verdict);
  byId("verdicts").replaceChildren(...said.map((row) => {
    const partial = row.curves.partial ? element("span", { className: "partial", textContent: ` (partial: ${row.curves.partial})` }) : "";
    return element("li", {}, row.name, partial, `: ${row.curves.verdict}`);
  }));
}

function drawVoice() {
  byId("voice-section").hidden = content.rows.every((row) => !row.voice);
  const traces = drawnRows().filter((row) => row.voice).map((row) => ({
    name: row.name + (row.voice.partial ? " (partial)" : ""), x: row.voice.seconds, y: row.voice.rows.map((r) => r[0]),
    error_y: bounds(row.voice.rows.map(([value, low, high]) => ({ value, low, high }))), mode: "lines+markers",
    line: { color: colour(row), dash: dash(row) },
  }));
  Plotly.react("voice", traces, layout({
    showlegend: true, xaxis: { title: { text: "time in the conversation (s)" }, rangemode: "tozero" },
    yaxis: { title: { text: "similarity to the first window" }, range: [0, 1.02] },
  }), CONFIG);
}

function drawCharts() {
  drawSuites();
  drawCurves();
  drawOverlay();
  drawVoice();
}

function update() {
  drawTable();
  drawCharts();
}

// ---------------------------------------------------------------- what does not change

function options(select, entries, wanted) {
  select.replaceChildren(...entries.map(([value, label]) => element("option", { value, textContent: label })));
  if (entries.some(([value]) => value === wanted)) select.value = wanted;
}

function drawSources() {
  const head = element("tr", {}, ...["model", "results", "date", ""].map((name) => element("th", { textContent: name })));
  const lines = content.rows.flatMap((row) => row.sources.map((source) => element(
    "tr", {}, element("td", { textContent: row.name }), element("td", { textContent: source.path }), element("td", { textContent: source.date }),
    element("td", { className: "partial", textContent: source.partial ? `partial: ${source.partial}` : "" }))));
  const runs = content.runs.map((run) => element(
    "tr", {}, element("td", { textContent: run.name }), element("td", { textContent: `${run.run}/metrics.jsonl` }), element("td"), element("td")));
  byId("sources").replaceChildren(head, ...lines, ...runs);
}

function drawAnchors() {
  const head = element("tr", {}, ...["model", ...content.anchor_columns].map((name) => element("th", { textContent: name })));
  const lines = content.anchors.map((anchor) => element(
    "tr", {}, ...[`${anchor.model} ${anchor.mark}`, ...anchor.numbers].map((cell) => element("td", { textContent: cell }))));
  byId("anchors").replaceChildren(head, ...lines);
}

function start() {
  byId("summary").textContent = content.summary;
  byId("remarks").replaceChildren(...content.remarks.map((remark) => element("li", { textContent: remark })));
  drawChoices();
  drawSources();
  drawAnchors();
  options(byId("curve"), [...curveNames()], ["valid/loss", "train/loss"].find((name) => curveNames().has(name)));
  const headline = content.rows.find((row) => row.curves?.headline)?.curves.headline;
  options(byId("line"), lineNames().map((name) => [name, name]), headline);
  byId("filter").addEventListener("input", (event) => { state.filter = event.target.value; update(); });
  byId("export").addEventListener("click", download);
  byId("all").addEventListener("click", () => drawAll(true));
  byId("none").addEventListener("click", () => drawAll(false));
  byId("curve").addEventListener("change", drawCurves);
  for (const id of ["line", "stream"]) byId(id).addEventListener("change", drawOverlay);
  for (const radio of document.querySelectorAll("input[name=shape]")) {
    radio.addEventListener("change", () => { state.shape = radio.value; drawSuites(); });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  update();
}

start();
