"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 40rem)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const coarse = matchMedia("(pointer: coarse)");
const printing = () => document.documentElement.classList.contains("printing");
const colour = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function shorten(name, length) {
  // An entity such as &lt; is one character on the screen.
  const characters = name.match(/&(lt|gt|amp);|[^]/gu) || [];
  return characters.length > length ? characters.slice(0, length - 1).join("") + "…" : name;
}

function faint(ink, opacity) {
  return ink + Math.round(255 * opacity).toString(16).padStart(2, "0");
}

function layout(xTitle, yTitle, more) {
  const axis = (title) => ({title: {text: shorten(title, 44), standoff: 10}, automargin: true, ticklabeloverflow: "allow",
    gridcolor: colour("line"), linecolor: colour("line"), zeroline: false});
  return Object.assign({
    font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("ink")},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: {l: 48, r: 16, t: 28, b: 48}, xaxis: axis(xTitle), yaxis: axis(yTitle),
    // Under the axis title, however high the plot is and however many lines the legend takes.
    legend: {orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", font: {size: 12}},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("cloud"), activecolor: colour("ink")},
    hoverlabel: {bgcolor: colour("panel"), bordercolor: colour("line"), align: "left",
      font: {color: colour("ink"), size: 12}},
    hovermode: "closest", dragmode: coarse.matches ? false : "zoom",
    width: printing() ? 680 : undefined,
  }, more);
}

function layoutOver(over, yTitle) {
  // Over "tokens", which are many, or "evaluations".
  const made = layout(over, yTitle);
  if (over === "tokens") Object.assign(made.xaxis, {tickformat: "~s", hoverformat: ",d", rangemode: "tozero"});
  return made;
}

const config = {displaylogo: false, responsive: true, displayModeBar: coarse.matches ? false : "hover",
  // plotly.js 4 offers to upload the chart to its maker's server; a report stays where it is.
  plotlyServerURL: "", showSendToCloud: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};

function line(name, x, y, ink, more) {
  return {type: "scatter", mode: "lines", name: name, x: x, y: y,
    hovertemplate: "%{y} after %{x}<extra>%{fullData.name}</extra>",
    line: Object.assign({color: ink, width: 2}, more)};
}

const upTo = (values) => values.map((_, i) => i + 1);

// Browsers that have no idle callbacks take the plots one after the other all the same.
const whenIdle = window.requestIdleCallback ?? ((run) => setTimeout(run, 50));

function show(plots) {
  // Of the plots, {id: function that draws it}, draws at once what is in view, and the others one by
  // one when the browser is idle, when they are scrolled near, or for paper: the page is usable
  // meanwhile. Draws again whenever the colours or the room for a plot change.
  const places = Object.keys(plots).map(element).filter(Boolean);
  const waiting = new Set(places);
  const draw = (place) => { waiting.delete(place); near.unobserve(place); plots[place.id](); };
  const near = new IntersectionObserver((entries) => entries.forEach(({isIntersecting, target}) => {
    if (isIntersecting && waiting.has(target)) draw(target);
  }), {rootMargin: "25%"});
  const inView = (place) => {
    const {top, bottom} = place.getBoundingClientRect();
    return top < innerHeight && bottom > 0;
  };
  const next = () => {
    const [place] = waiting;
    if (place) { draw(place); whenIdle(next); }
  };
  const again = () => places.filter((place) => !waiting.has(place)).forEach(draw);
  const forPaper = (on) => {
    document.documentElement.classList.toggle("printing", on);
    places.forEach(draw);
  };
  places.filter(inView).forEach(draw);
  waiting.forEach((place) => near.observe(place));
  whenIdle(next);
  [dark, narrow].forEach((query) => query.addEventListener("change", again));
  addEventListener("beforeprint", () => forPaper(true));
  addEventListener("afterprint", () => forPaper(false));
}
