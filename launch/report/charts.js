// Draws the charts of a report. All texts reach the page as text of a canvas, never as HTML.
"use strict";
(async () => {
  const text = (id) => document.getElementById(id).textContent;
  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(text(id)), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }
  const library = document.createElement("script");
  library.textContent = await unpacked("library"); // allowed by its digest in the policy of the page
  document.head.append(library);
  const drawn = JSON.parse(await unpacked("drawn"));
  const facts = JSON.parse(text("everstep-report"));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const phase = (part) => color(`c-${part.replace(" ", "-")}`);
  const short = (value) => {
    const size = Math.abs(value);
    if (typeof value !== "number") return String(value);
    if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2);
    return size >= 1e4 ? value.toLocaleString("en", { notation: "compact" }) : String(+value.toPrecision(5));
  };
  const base = () => ({
    animation: false,
    textStyle: { fontFamily: "system-ui, sans-serif", color: color("ink") },
    grid: { left: 54, right: 14, top: 12, bottom: 30 },
    // Rich text, since the other kind is HTML with styles of its own, which the policy refuses.
    tooltip: { trigger: "axis", renderMode: "richText", confine: true, backgroundColor: color("card"),
      borderColor: color("line"), textStyle: { color: color("ink"), fontSize: 12 } },
  });
  const axis = (more) => ({ axisLine: { lineStyle: { color: color("line") } }, axisLabel: { color: color("soft"), hideOverlap: true },
    splitLine: { lineStyle: { color: color("line") } }, ...more });
  let smoothing = 0.6;
  let logarithmic = false;

  function smoothed(points) {
    let mean = 0, weight = 0;
    return points.map(([step, value]) => {
      mean = smoothing * mean + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return [step, +(mean / weight).toPrecision(6)];
    });
  }

  function line(name, data, tone, more = {}) {
    return { name, data, type: "line", symbol: "none", color: tone, lineStyle: { width: 1.8, color: tone }, ...more };
  }

  function marks(chart) {
    const restarts = { silent: true, symbol: "none", label: { show: false },
      lineStyle: { color: color("c-replayed"), type: "dashed", width: 1 },
      data: (drawn.curves.marks.restarted || []).map((step) => ({ xAxis: step })) };
    const values = chart.curves.flatMap((curve) => curve.points.map((point) => point[1]));
    const low = Math.min(...values), high = Math.max(...values);
    const signs = (name, steps, at, rotate, tone) => ({ name, type: "scatter", symbol: "triangle", symbolRotate: rotate,
      symbolSize: 7, color: tone, data: steps.map((step) => [step, at]), tooltip: { show: false }, silent: true, z: 5 });
    const wrong = chart.curves.flatMap((curve) => curve.nonfinite_steps);
    return { restarts, more: [signs("save", drawn.curves.marks.saved || [], low, 0, color("c-checkpoint")),
      ...(wrong.length ? [signs("NaN or Inf", wrong, high, 180, color("bad"))] : [])] };
  }

  const steps = drawn.curves ? drawn.curves.charts.flatMap((chart) => chart.curves.flatMap((each) => each.points.map((point) => point[0]))) : [];
  const last = steps.reduce((one, other) => Math.max(one, other), 0);

  function curve(index) {
    const chart = drawn.curves.charts[index], series = [];
    const { restarts, more } = marks(chart);
    for (const each of chart.curves) {
      const train = each.source === "train", tone = train ? color("accent") : color("c-replayed");
      const soft = train && smoothing > 0 && each.points.length > 20;
      if (each.replayed.length) series.push(line(`${each.source}, replayed`, each.replayed, tone,
        { lineStyle: { width: 1, type: "dashed", color: tone, opacity: 0.45 }, symbol: each.replayed.length < 3 ? "circle" : "none", symbolSize: 4 }));
      if (soft) series.push(line(`${each.source}, raw`, each.points, tone, { lineStyle: { width: 1, color: tone, opacity: 0.3 }, tooltip: { show: false } }));
      series.push(line(each.source, soft ? smoothed(each.points) : each.points, tone,
        train ? { markLine: restarts } : { symbol: each.points.length < 60 ? "circle" : "none", symbolSize: 5, markLine: restarts }));
    }
    const log = logarithmic && chart.name.includes("loss");
    const legend = { show: chart.curves.length > 1, data: chart.curves.map((each) => each.source), right: 6, top: 0, itemWidth: 14,
      textStyle: { color: color("soft") } };
    const tall = chart.curves.length > 1 ? 30 : 12;
    return { ...base(), legend, grid: { ...base().grid, top: tall }, series: [...series, ...(log ? [] : more)],
      xAxis: axis({ type: "value", min: 0, max: last, splitLine: { show: false }, axisLabel: { color: color("soft"), hideOverlap: true, formatter: short } }),
      yAxis: axis({ type: log ? "log" : "value", scale: true, axisLabel: { color: color("soft"), formatter: short } }),
      dataZoom: [{ type: "inside", filterMode: "none" }],
      toolbox: { show: true, right: -100, feature: { dataZoom: { yAxisIndex: "none", filterMode: "none" } } } };
  }

  function timeline() {
    const { bars, rows, attempts } = drawn.timeline;
    const start = Math.min(...bars.map((bar) => bar.since));
    const why = (bar) => { const found = attempts.find((each) => each.number === bar.attempt);
      return found ? `attempt ${bar.attempt}: ${found.outcome}` : "between attempts"; };
    const draw = (_, api) => {
      const from = api.coord([api.value(1), api.value(0)]), to = api.coord([api.value(2), api.value(0)]);
      const height = Math.min(26, api.size([0, 1])[1] * 0.6);
      return { type: "rect", shape: { x: from[0], y: from[1] - height / 2, width: Math.max(to[0] - from[0], 0.6), height },
        style: { fill: phase(bars[api.value(3)].part) } };
    };
    const ends = attempts.filter((each) => bars.some((bar) => bar.attempt === each.number)).map((each) => {
      const last = bars.filter((bar) => bar.attempt === each.number).reduce((a, b) => (b.until > a.until ? b : a));
      return { value: [last.until - start, last.row], name: `attempt ${each.number}: ${each.outcome}` };
    });
    const clock = (value) => value >= 7200 ? `${+(value / 3600).toFixed(1)} h` : value >= 120 ? `${+(value / 60).toFixed(1)} min` : `${+value.toFixed(1)} s`;
    return { ...base(), grid: { left: 12, right: 24, top: 8, bottom: 28, containLabel: true },
      tooltip: { ...base().tooltip, trigger: "item", formatter: ({ seriesIndex, dataIndex, name }) => {
        if (seriesIndex === 1) return name;
        const bar = bars[dataIndex];
        return `${bar.part}, ${clock(bar.until - bar.since)}\n${why(bar)}\nfrom ${clock(bar.since - start)} to ${clock(bar.until - start)}`;
      } },
      xAxis: axis({ type: "value", min: 0, max: Math.max(...bars.map((bar) => bar.until)) - start, axisLabel: { color: color("soft"), formatter: clock } }),
      yAxis: axis({ type: "category", data: rows, inverse: true, axisLabel: { color: color("ink"), width: 110, overflow: "truncate" } }),
      dataZoom: [{ type: "inside", filterMode: "weakFilter" }],
      series: [{ type: "custom", renderItem: draw, encode: { x: [1, 2], y: 0 }, data: bars.map((bar, n) => [bar.row, bar.since - start, bar.until - start, n]) },
        { type: "scatter", symbol: "diamond", symbolSize: 9, color: color("ink"), data: ends }] };
  }

  function nodes(figure) {
    const found = drawn.nodes.series.filter((each) => each.figure === figure);
    const data = (each) => each.points.map(([at, value]) => [at * 1000, value]);
    return { ...base(), legend: { show: found.length > 1, type: "scroll", textStyle: { color: color("soft") } }, color: palette(),
      grid: { ...base().grid, top: found.length > 1 ? 30 : 12 },
      series: found.map((each) => ({ name: each.host, type: "line", symbol: each.points.length < 3 ? "circle" : "none", data: data(each), lineStyle: { width: 1.4 } })),
      xAxis: axis({ type: "time", splitLine: { show: false } }), yAxis: axis({ type: "value", axisLabel: { color: color("soft"), formatter: short } }) };
  }
  const palette = () => ["productive", "start", "replayed", "checkpoint", "evaluation", "data-wait", "stalled"].map((part) => color(`c-${part}`));

  function matrix(index) {
    const { rows } = drawn.curves.matrices[index];
    const cells = rows.flatMap((row, y) => row.map((value, x) => [x, y, value]).filter((cell) => cell[2] !== null));
    const values = cells.map((cell) => cell[2]);
    return { ...base(), tooltip: { ...base().tooltip, trigger: "item" }, grid: { left: 30, right: 14, top: 8, bottom: 24 },
      xAxis: axis({ type: "category", data: rows[0].map((_, n) => n) }), yAxis: axis({ type: "category", inverse: true, data: rows.map((_, n) => n) }),
      visualMap: { show: false, min: Math.min(...values), max: Math.max(...values), inRange: { color: [color("card"), color("accent")] } },
      series: [{ type: "heatmap", data: cells }] };
  }

  function histogram(index) {
    const { edges, counts } = facts.media.shown[index];
    return { ...base(), xAxis: axis({ type: "category", data: counts.map((_, n) => short((edges[n] + edges[n + 1]) / 2)) }),
      yAxis: axis({ type: "value" }), series: [{ type: "bar", data: counts, barCategoryGap: "2%", color: color("accent") }] };
  }

  const options = { curve, timeline, nodes, matrix, histogram };
  const shown = [];
  for (const place of document.querySelectorAll(".plot")) {
    const { kind, index } = place.dataset;
    if (kind === "timeline") {
      if (!drawn.timeline.bars.length) { place.remove(); continue; }
      place.style.height = `${Math.min(40 + 40 * drawn.timeline.rows.length, 900) + 20}px`;
    }
    const instance = echarts.init(place);
    const make = () => options[kind](index);
    shown.push({ place, instance, make, kind });
    instance.setOption(make());
    if (kind === "curve") {
      instance.group = "curves";
      instance.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true });
      instance.getZr().on("dblclick", () => instance.dispatchAction({ type: "dataZoom", start: 0, end: 100 }));
    }
  }
  echarts.connect("curves");
  const redraw = (kind) => shown.filter((each) => !kind || each.kind === kind).forEach((each) => each.instance.setOption(each.make(), { replaceMerge: ["series"] }));
  const resize = () => shown.forEach((each) => each.instance.resize());
  document.getElementById("smoothing")?.addEventListener("input", (event) => { smoothing = +event.target.value; redraw("curve"); });
  document.getElementById("log")?.addEventListener("change", (event) => { logarithmic = event.target.checked; redraw("curve"); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  matchMedia("print").addEventListener("change", () => { redraw(); resize(); });
  new ResizeObserver(resize).observe(document.body);
  document.documentElement.dataset.drawn = shown.length;
})();
