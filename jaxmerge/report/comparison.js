// Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
const PALETTE = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const DASHES = ["solid", "dash", "dot", "dashdot"];

const ofRun = (i, name, x, y) => line(shorten(name, 40), x, y, PALETTE[i % PALETTE.length],
  {shape: "hv", dash: DASHES[Math.floor(i / PALETTE.length) % DASHES.length]});

function drawCurves() {
  const over = element("over")?.value ?? "evaluations", byTokens = over === "tokens";
  const traces = data.curves.filter((curve) => curve.best.length).map((curve, i) =>
    ofRun(i, curve.name, byTokens ? curve.tokens : upTo(curve.best), byTokens ? curve.risen : curve.best));
  Plotly.react("curves", traces, layoutOver(over, ["objective", "search", data.unit].filter(Boolean).join(", ")), config);
}

function drawVolumes() {
  const traces = data.volumes.map((volume, i) => ofRun(i, volume.name, volume.tokens, volume.best));
  Plotly.react("volumes", traces, layoutOver("tokens", "hypervolume, search"), config);
}

show({curves: drawCurves, volumes: drawVolumes});
element("over")?.addEventListener("change", drawCurves);
