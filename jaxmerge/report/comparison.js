// Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
const PALETTE = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const DASHES = ["solid", "dash", "dot", "dashdot"];

show({curves: () => {
  const traces = data.curves.filter((curve) => curve.best.length).map((curve, i) =>
    line(shorten(curve.name, 40), upTo(curve.best), curve.best, PALETTE[i % PALETTE.length],
      {shape: "hv", dash: DASHES[Math.floor(i / PALETTE.length) % DASHES.length]}));
  Plotly.react("curves", traces,
    layout("evaluations", ["objective", "search", data.unit].filter(Boolean).join(", ")), config);
}});
