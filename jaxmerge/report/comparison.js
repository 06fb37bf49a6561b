// Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
const PALETTE = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const DASHES = ["solid", "dash", "dot", "dashdot"];

function drawCurves() {
  const over = element("over")?.value ?? "evaluations", byTokens = over === "tokens";
  const traces = data.curves.filter((curve) => curve.best.length).map((curve, i) =>
    line(shorten(curve.name, 40), byTokens ? curve.tokens : upTo(curve.best), byTokens ? curve.risen : curve.best,
      PALETTE[i % PALETTE.length], {shape: "hv", dash: DASHES[Math.floor(i / PALETTE.length) % DASHES.length]}));
  Plotly.react("curves", traces, layoutOver(over, ["objective", "search", data.unit].filter(Boolean).join(", ")), config);
}

show({curves: drawCurves});
element("over")?.addEventListener("change", drawCurves);
