const all = data.models.concat(data.points);
const last = data.choices.length - 1;  // the objective
const titled = (choice, split) =>
  [data.choices[choice], split, data.units[choice]].filter(Boolean).join(", ");
const written = (choice, value) => value.toFixed(data.digits[choice]) + data.units[choice];

// What is drawn last, over all others, is named first.
const inRank = (traces) =>
  traces.map((trace, i) => Object.assign(trace, {legendrank: traces.length - i}));

function describe(model, split) {
  const lines = ["<b>" + shorten(model.kind === "search" ? "searched merge" : model.name, 40) + "</b>",
    "id " + model.id + (model.origin ? ", " + model.origin : "")];
  data.choices.forEach((choice, c) => {
    const ends = split === "test" ? model.ci95[c].map((end) => end.toFixed(data.digits[c])) : null;
    lines.push(shorten(choice, 30) + " " + written(c, model[split][c]) + (ends ? " [" + ends.join(", ") + "]" : ""));
  });
  const weights = model.weights.map((weight, k) => [weight, data.checkpoints[k]])
    .filter(([weight]) => Math.abs(weight) >= 0.0005)
    .sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
  lines.push("<i>weights</i>");
  weights.slice(0, 10).forEach(([weight, name]) => lines.push(weight.toFixed(3) + " " + shorten(name, 30)));
  if (weights.length > 10) lines.push("and " + (weights.length - 10) + " smaller");
  return lines.join("<br>");
}

function markers(name, models, split, x, y, marker, more) {
  return Object.assign({
    type: "scatter", mode: "markers", name: name, marker: marker, hoverinfo: "text", cliponaxis: false,
    x: models.map((model) => model[split][x]),
    y: models.map((model) => model[split][y]),
    hovertext: models.map((model) => describe(model, split)),
  }, more);
}

function errorBar(model, choice, ink) {
  const [low, high] = model.ci95[choice], mean = model.test[choice];
  return {type: "data", symmetric: false, array: [high - mean], arrayminus: [mean - low],
    color: ink, thickness: 1.5, width: 5};
}

function errorBars(models, choice) {
  const ends = (one, end) => Math.abs(one.ci95[choice][end] - one.test[choice]);
  return {type: "data", symmetric: false, array: models.map((one) => ends(one, 1)),
    arrayminus: models.map((one) => ends(one, 0)), color: colour("front"), thickness: 1, width: 3};
}

function staircase(models, x, y) {
  // What no candidate beats on these two axes: from the left, ever further right and lower.
  const sorted = models.map((model) => [model.search[x], model.search[y]])
    .sort((a, b) => b[0] - a[0] || b[1] - a[1]);
  const front = [];
  sorted.forEach((point) => {
    if (!front.length || point[1] > front[front.length - 1][1]) front.push(point);
  });
  front.reverse();
  return {type: "scatter", mode: "lines", name: "front of the two axes", hoverinfo: "skip",
    x: front.map((point) => point[0]), y: front.map((point) => point[1]),
    line: {shape: "vh", width: 1.5, color: colour("front")}};
}

// Where a label may stand, from its point: plotly's name for it, and the corner of its box in
// widths and heights of the label.
const SIDES = [["top center", -0.5, -1.4], ["bottom center", -0.5, 0.4], ["middle right", 0.1, -0.5],
  ["middle left", -1.1, -0.5]];

function labelled(id, points, xs, ys) {
  // Text for the points, each {x, y, name}, that have room for it; the rest tell when hovered.
  // The plot is as wide and as high as it takes for xs and ys.
  if (points.length > 40) return points.map(() => ["", "top center"]);
  const box = element(id), span = (values) => Math.max(...values) - Math.min(...values) || 1;
  const wide = (box.clientWidth - 80) * 0.9 / span(xs), high = (box.clientHeight - 150) * 0.85 / span(ys);
  const taken = points.map((point) => [point.x * wide - 6, -point.y * high - 6, 12, 12]);
  const free = ([x, y, w, h], own) => taken.every(([u, v, a, b], i) =>
    i === own || x + w < u || u + a < x || y + h < v || v + b < y);
  return points.map((point, own) => {
    const name = shorten(point.name, narrow.matches ? 12 : 18), w = 6.6 * name.replace(/&\w+;/g, "x").length, h = 14;
    for (const [side, dx, dy] of SIDES) {
      const place = [point.x * wide + dx * w, -point.y * high + dy * h, w, h];
      if (free(place, own)) { taken.push(place); return [name, side]; }
    }
    return ["", "top center"];
  });
}

const texted = (labels) => ({mode: "markers+text", text: labels.map(([name]) => name),
  textposition: labels.map(([, side]) => side), textfont: {size: 11, color: colour("muted")}});

function tradeoffTraces(split, x, y) {
  const kind = (wanted) => data.models.filter((model) => model.kind === wanted);
  const winner = kind("search"), page = colour("page");
  const outlined = (symbol, size, name) =>
    ({symbol: symbol, size: size, color: colour(name), line: {color: page, width: 1}});
  // The winner takes its room first, but has no label: its star is in the legend.
  const places = winner.concat(kind("baseline"), kind("individual"));
  const drawn = split === "test" ? data.models : all;
  const labels = labelled("tradeoff", places.map((model) =>
    ({x: model[split][x], y: model[split][y], name: model.kind === "search" ? "" : model.name})),
  drawn.map((model) => model[split][x]), drawn.map((model) => model[split][y]));
  const of = (wanted) => texted(labels.filter((_, i) => places[i].kind === wanted));
  const named = [
    markers("single checkpoints", kind("individual"), split, x, y, outlined("circle", 11, "individual"), of("individual")),
    markers("baselines", kind("baseline"), split, x, y, outlined("diamond", 12, "baseline"), of("baseline")),
  ];
  const tested = winner.filter((model) => model.test);
  const onTest = (symbol) => tested.map((model) => markers("searched merge on test, 95%", [model], "test", x, y,
    {symbol: symbol, size: 15, color: colour("winner"), line: {color: colour("winner"), width: 1.5}},
    {error_x: errorBar(model, x, colour("winner")), error_y: errorBar(model, y, colour("winner"))}));
  const points = kind("front"), numbered = {mode: "markers+text", textposition: "top right",
    text: points.map((point) => point.name.replace("point ", "")), textfont: {size: 11, color: colour("front")}};
  const drawnPoints = (more) => points.length ? [markers("points of the front", points, split, x, y,
    outlined("square", 9, "front"), Object.assign(numbered, more))] : [];
  if (split === "test") return [...drawnPoints({error_x: errorBars(points, x), error_y: errorBars(points, y)}),
    ...named, ...onTest("star")];
  const small = (symbol, size, name, opacity) =>
    ({symbol: symbol, size: size, color: colour(name), opacity: opacity});
  const search = data.points.filter((point) => point.origin === "search");
  const others = data.points.filter((point) => point.origin !== "search");
  const front = all.filter((model) => data.pareto.includes(model.id));
  return inRank([
    markers("candidates of baselines", others, split, x, y, small("x-thin-open", 5, "baseline", 0.5)),
    markers("searched candidates", search, split, x, y, small("circle", 6, "cloud", 0.55)),
    staircase(all, x, y),
    markers("Pareto front, all tasks", front, split, x, y,
      {symbol: "circle-open", size: 11, color: colour("front"), line: {width: 1.3}}),
    ...drawnPoints({}),
    ...named,
    ...onTest("star-open"),
    markers(tested.length ? "searched merge" : "best merge so far", winner, split, x, y, outlined("star", 18, "winner")),
  ].filter((trace) => trace.x.length));
}

function drawTradeoff() {
  const x = Number(element("x").value), y = Number(element("y").value), split = element("split")?.value ?? "search";
  Plotly.react("tradeoff", tradeoffTraces(split, x, y), layout(titled(x, split), titled(y, split)), config);
}

function spread(search, at) {
  // Of each generation, where it ends.
  return [
    Object.assign(line("spread of a generation", at.concat(at.slice().reverse()),
      search.high.concat(search.low.slice().reverse()), colour("cloud"), {width: 0}),
    {fill: "toself", fillcolor: faint(colour("cloud"), 0.22), hoverinfo: "skip", hovertemplate: undefined}),
    Object.assign(line("median of a generation", at, search.median, colour("cloud"), {width: 1.5}),
      {mode: "lines+markers", marker: {size: 4}}),
  ];
}

const singleLine = (from, end) => data.curves.single === null ? [] : [
  line("best single checkpoint", [from, end], [data.curves.single, data.curves.single], colour("individual"),
    {dash: "dash", width: 1.5})];

function overEvaluations() {
  const {search, random} = data.curves;
  const end = Math.max(search.best.length, random.best.length, 2);
  const traces = search.best.length ? spread(search, search.at) : [];
  traces.push(...singleLine(1, end));
  if (random.best.length) traces.push(
    line("random search, best so far", upTo(random.best), random.best, colour("baseline"), {shape: "hv", dash: "dot"}));
  if (search.best.length) traces.push(
    line("search, best so far", upTo(search.best), search.best, colour("winner"), {shape: "hv", width: 2.5}));
  return traces;
}

// Ways to search that are no search: one of a single evaluation is a point.
const STROKES = ["dot", "dashdot", "longdash"], SYMBOLS = ["diamond", "square", "triangle-up"];

function overTokens() {
  const {search, ways} = data.curves;
  const traces = search.best.length ? spread(search, search.tokens) : [];
  traces.push(...singleLine(0, Math.max(...ways.flatMap((way) => way.tokens), 1)));
  const drawn = ways.filter((way) => way.best.length);
  const baselines = drawn.filter((way) => way.name !== "search");
  const points = baselines.filter((way) => way.evaluations === 1);
  points.forEach((way, i) => traces.push(Object.assign(line(way.name, way.tokens, way.best, colour("baseline")),
    {mode: "markers", cliponaxis: false, marker: {symbol: SYMBOLS[i % SYMBOLS.length], size: 9, color: colour("baseline"),
      line: {color: colour("page"), width: 1}}})));
  baselines.filter((way) => way.evaluations > 1).reverse().forEach((way, i) => traces.push(
    line(way.name + ", best so far", way.tokens, way.best, colour("baseline"),
      {shape: "hv", dash: STROKES[i % STROKES.length]})));
  drawn.filter((way) => way.name === "search").forEach((way) => traces.push(
    line("search, best so far", way.tokens, way.best, colour("winner"), {shape: "hv", width: 2.5})));
  return traces;
}

function drawCurve() {
  const over = element("over")?.value ?? "evaluations";
  const traces = inRank(over === "tokens" ? overTokens() : overEvaluations());
  Plotly.react("curve", traces, layoutOver(over, titled(last, "search")), config);
}

function drawWeights() {
  const points = data.analyses.weights, ink = colour("individual");
  const xs = points.map((point) => point.score), ys = points.map((point) => point.weight);
  const labels = labelled("weights", points.map((point, i) => ({x: xs[i], y: ys[i], name: point.name})), xs, ys);
  Plotly.react("weights", [Object.assign({
    type: "scatter", x: xs, y: ys,
    marker: {size: 11, color: ink, line: {color: colour("page"), width: 1}}, cliponaxis: false, hoverinfo: "text",
    hovertext: points.map(({name, score, weight}) =>
      "<b>" + shorten(name, 40) + "</b><br>weight " + weight.toFixed(3) + "<br>objective " + written(last, score)),
  }, texted(labels))], layout("own " + titled(last, "search"), "weight in the merge"), config);
}

function drawSizes() {
  const points = data.analyses.sizes, sizes = points.map((point) => point.m);
  const told = points.map(({evaluations, checkpoints}) => evaluations + " evaluations<br>" +
    checkpoints.map((name) => shorten(name, 30)).slice(0, 16).join("<br>"));
  const drawn = (name, key, ink, more) => Object.assign(line(name, sizes, points.map((point) => point[key]), ink),
    {mode: "lines+markers", marker: {size: 8}, hovertext: told,
      hovertemplate: "<b>%{y}</b>, best %{x}<br>%{hovertext}<extra>%{fullData.name}</extra>"}, more);
  Plotly.react("sizes", [
    drawn("search", "search", colour("cloud")),
    drawn("test, 95%", "test", colour("winner"), {error_y: {type: "data", symmetric: false, width: 5, thickness: 1.5,
      array: points.map((point) => point.ci95[1] - point.test),
      arrayminus: points.map((point) => point.test - point.ci95[0])}}),
  ], layout("checkpoints in the pool", titled(last)), config);
}

function drawVolumes() {
  const ways = data.front.volumes;
  const ink = (way) => way.name === "search" ? colour("winner") : colour("baseline");
  const drawn = ways.filter((way) => way.tokens.length > 2).map((way, i) => line(way.name, way.tokens, way.best, ink(way),
    way.name === "search" ? {shape: "hv", width: 2.5} : {shape: "hv", dash: STROKES[i % STROKES.length]}));
  const few = ways.filter((way) => way.tokens.length <= 2).map((way, i) => Object.assign(
    line(way.name, way.tokens.slice(-1), way.best.slice(-1), ink(way)),
    {mode: "markers", cliponaxis: false, marker: {symbol: SYMBOLS[i % SYMBOLS.length], size: 9, color: ink(way)}}));
  Plotly.react("volumes", inRank([...few, ...drawn]), layoutOver("tokens", "hypervolume, search"), config);
}

function prefer() {
  // The point whose gains lag least behind the best point of each task, each as dear as the reader
  // says: every point is the choice of some preference.
  const points = data.front.points, worth = [...document.querySelectorAll(".worth")].map((slider) => Number(slider.value));
  const total = worth.reduce((sum, one) => sum + one, 0) || 1;
  const ends = (c) => [Math.min, Math.max].map((end) => end(...points.map((point) => point.search[c])));
  const lag = (point) => {
    const lags = point.search.map((score, c) => {
      const [low, high] = ends(c);
      return worth[c] / total * (high - score) / (high - low || 1);
    });
    return Math.max(...lags) + 0.05 * lags.reduce((sum, one) => sum + one, 0);
  };
  const chosen = points.reduce((best, point, i) => lag(point) < lag(points[best]) ? i : best, 0);
  document.querySelectorAll(".points tbody tr").forEach((row, i) => row.classList.toggle("chosen", i === chosen));
  const point = points[chosen];
  element("preferred").innerHTML = "Point " + point.name + ": " + point.test.map((score, c) =>
    data.choices[c] + " " + written(c, score)).join(", ") + " on test.<br><code>" +
    data.front.export + point.name + " --out=merged</code>";
}

if (data.front) {
  document.querySelectorAll(".worth").forEach((slider) => slider.addEventListener("input", prefer));
  prefer();
}
show({tradeoff: drawTradeoff, curve: drawCurve, weights: drawWeights, sizes: drawSizes, volumes: drawVolumes});
["x", "y", "split"].forEach((id) => element(id)?.addEventListener("change", drawTradeoff));
element("over")?.addEventListener("change", drawCurve);
