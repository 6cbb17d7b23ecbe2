// mount(el, data): one query and its keys in the plane, dragged by hand or moved with the arrows.
// data = {query, keys, values, temperature, scaled}. The arithmetic is in three plain functions.

function scores(query, keys, scaled) {
  var root = scaled ? Math.sqrt(query.length) : 1;
  return keys.map(function (k) { return k.reduce(function (sum, x, d) { return sum + x * query[d]; }, 0) / root; });
}

function softmax(scores, temperature) {
  var top = Math.max.apply(null, scores);
  var e = scores.map(function (s) { return Math.exp((s - top) / temperature); });
  var total = e.reduce(function (a, b) { return a + b; }, 0);
  return e.map(function (x) { return x / total; });
}

function output(weights, values) {
  return weights.reduce(function (sum, w, s) { return sum + w * values[s]; }, 0);
}

globalThis.heedLookup = { scores: scores, softmax: softmax, output: output };

function mount(el, data) {
  if (!el || el.dataset.ready) return;
  el.dataset.ready = "1";
  var NAMES = "abcde", COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00"];
  var query, keys, temperature, scaled, timer;
  var reach = Math.max(2, Math.ceil(Math.max.apply(null, data.keys.concat([data.query]).flat().map(Math.abs))));
  var low = Math.min.apply(null, data.values), high = Math.max.apply(null, data.values), span = high - low || 1;

  function html(tag, attrs, parent, text) { return set(document.createElement(tag), attrs, parent, text); }
  function svg(tag, attrs, parent, text) {
    return set(document.createElementNS("http://www.w3.org/2000/svg", tag), attrs, parent, text);
  }
  function set(e, attrs, parent, text) {
    Object.keys(attrs || {}).forEach(function (a) { e.setAttribute(a, attrs[a]); });
    if (text !== undefined) e.textContent = text;
    if (parent) parent.append(e);
    return e;
  }
  function say(x, digits) { return x.toFixed(digits === undefined ? 2 : digits).replace(/^-(0\.?0*)$/, "$1"); }
  function px(x) { return 100 * x / reach; } // the plane is 100 units from its middle to its edge

  var root = html("div");
  html("style", {}, root).textContent =
    ".xp-look{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1.15fr);gap:1rem 1.4rem;align-items:center}" +
    "@media(max-width:34rem){.xp-look{grid-template-columns:minmax(0,1fr)}}" +
    ".xp-look svg{display:block;width:100%;height:auto;overflow:visible;color:inherit}" +
    ".xp-plane{touch-action:pan-y}.xp-hand{cursor:grab;touch-action:none}.xp .xp-hand:focus-visible{outline:none}" +
    ".xp-hand:active{cursor:grabbing}.xp-hand .xp-ring{fill:none;stroke:none}" +
    ".xp-hand:focus-visible .xp-ring{stroke:var(--xp-accent);stroke-width:3}" +
    ".xp.xp table{width:100%;border-collapse:collapse;margin:0;font-size:.95rem;font-variant-numeric:tabular-nums;border:0;display:table}" +
    ".xp.xp th,.xp.xp td{padding:.25rem .35rem;text-align:right;border:0;border-bottom:1px solid var(--xp-line);background:none;color:inherit;white-space:nowrap}" +
    ".xp.xp th{font-weight:600}.xp.xp tr{background:none}.xp.xp .xp-bar{text-align:left;width:40%}" +
    ".xp-bar span{display:inline-block;height:.8rem;vertical-align:-.05rem;margin-right:.35rem;min-width:1px}" +
    ".xp-dot{display:inline-block;width:.75rem;height:.75rem;border-radius:50%;margin-right:.35rem}" +
    ".xp-set{display:flex;flex-wrap:wrap;gap:.4rem 1.4rem;align-items:center;margin:.9rem 0 .6rem}" +
    ".xp-set label{display:flex;gap:.5rem;align-items:center;margin:0}.xp-set input[type=range]{width:9rem;min-height:1.5rem;accent-color:var(--xp-accent)}" +
    ".xp-set input[type=checkbox]{width:1.1rem;height:1.1rem;accent-color:var(--xp-accent)}.xp-words{margin:.4rem 0 0;min-height:3em}";

  var grid = html("div", { class: "xp-look" }, root);
  var plane = svg("svg", { viewBox: "-112 -112 224 224", class: "xp-plane", role: "group", "aria-label": "The plane: drag the points, or focus one and use the arrow keys" }, html("div", {}, grid));
  for (var n = -reach; n <= reach; n++) {
    svg("path", { d: "M" + px(n) + " -100V100M-100 " + px(n) + "H100", stroke: "currentColor", "stroke-opacity": n ? 0.13 : 0.6, fill: "none" }, plane);
  }
  svg("text", { x: 98, y: 11, "font-size": 10, fill: "currentColor", "text-anchor": "end" }, plane, reach);
  svg("text", { x: 4, y: -91, "font-size": 10, fill: "currentColor" }, plane, reach);
  var arrow = svg("path", { stroke: "currentColor", "stroke-width": 2.5, fill: "none" }, plane);

  var panel = html("div", {}, grid), table = html("table", {}, panel), head = html("tr", {}, html("thead", {}, table));
  ["key", "value", "q·k", "score", "weight"].forEach(function (t, i) {
    html("th", { scope: "col", class: i === 4 ? "xp-bar" : "" }, head, t);
  });
  var body = html("tbody", {}, table), rows = data.values.map(function (v, s) {
    var tr = html("tr", {}, body), name = html("th", { scope: "row" }, tr), cells;
    html("span", { class: "xp-dot", style: "background:" + COLOURS[s], "aria-hidden": "true" }, name);
    name.append(NAMES[s]);
    html("td", {}, tr, say(v, v === Math.round(v) ? 0 : 2));
    cells = [html("td", {}, tr), html("td", {}, tr)];
    var td = html("td", { class: "xp-bar" }, tr);
    return { dot: cells[0], score: cells[1], bar: html("span", { style: "background:" + COLOURS[s], "aria-hidden": "true" }, td), weight: html("b", { style: "font-weight:400" }, td) };
  });

  // The beam: every value carries its weight, and the output is the place where it balances.
  var beam = svg("svg", { viewBox: "-8 -34 256 62", role: "img" }, panel);
  function along(v) { return 20 + 200 * (v - low) / span; }
  svg("path", { d: "M0 0H240", stroke: "currentColor", "stroke-width": 2 }, beam);
  var loads = data.values.map(function (v, s) {
    svg("path", { d: "M" + along(v) + " -4V4", stroke: "currentColor" }, beam);
    return svg("circle", { cx: along(v), fill: COLOURS[s], "fill-opacity": 0.9 }, beam);
  });
  var pivot = svg("path", { fill: "currentColor" }, beam);
  var number = svg("text", { y: 27, "font-size": 13, fill: "currentColor", "text-anchor": "middle" }, beam);

  var controls = html("div", { class: "xp-set" }, root), label = html("label", {}, controls, "Temperature ");
  var slider = html("input", { type: "range", min: -1.3, max: 1.3, step: 0.05 }, label), shown = html("output", {}, label);
  var tick = html("label", {}, controls), box = html("input", { type: "checkbox" }, tick);
  tick.append("divide by √2");
  var reset = html("button", { type: "button" }, controls, "Reset");
  var words = html("p", { class: "xp-words", "aria-live": "polite" }, root);

  function hand(name, colour, get, put) {
    var g = svg("g", { class: "xp-hand", tabindex: 0, role: "slider", "aria-label": name, "aria-valuemin": -reach, "aria-valuemax": reach }, plane);
    svg("circle", { r: 20, fill: "transparent" }, g); // room for a finger
    svg("circle", { r: 12, class: "xp-ring" }, g);
    svg("circle", { r: 8, fill: colour, stroke: "currentColor", "stroke-width": 1 }, g);
    var tag = svg("text", { y: -9, "font-size": 13, fill: "currentColor" }, g, name.replace("key ", ""));
    function move(x, y) {
      function inside(v) { return Math.round(20 * Math.max(-reach, Math.min(reach, v))) / 20; }
      put([inside(x), inside(y)]);
      draw();
    }
    g.addEventListener("pointerdown", function (e) { g.setPointerCapture(e.pointerId); g.focus(); e.preventDefault(); });
    g.addEventListener("pointermove", function (e) {
      if (!g.hasPointerCapture(e.pointerId)) return;
      var p = new DOMPoint(e.clientX, e.clientY).matrixTransform(plane.getScreenCTM().inverse());
      move(p.x * reach / 100, -p.y * reach / 100);
    });
    g.addEventListener("keydown", function (e) {
      var way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[e.key], by = e.shiftKey ? 0.5 : 0.1;
      if (!way) return;
      e.preventDefault();
      move(get()[0] + by * way[0], get()[1] + by * way[1]);
    });
    return function () {
      var p = get();
      g.setAttribute("transform", "translate(" + px(p[0]) + " " + -px(p[1]) + ")");
      tag.setAttribute("x", p[0] > 0.6 * reach ? -11 : 11); // names stay inside the plane
      tag.setAttribute("text-anchor", p[0] > 0.6 * reach ? "end" : "start");
      g.setAttribute("aria-valuenow", p[0]);
      g.setAttribute("aria-valuetext", "x " + say(p[0]) + ", y " + say(p[1]));
    };
  }
  var hands = data.keys.map(function (k, s) {
    return hand("key " + NAMES[s], COLOURS[s], function () { return keys[s]; }, function (p) { keys[s] = p; });
  });
  hands.push(hand("query", "currentColor", function () { return query; }, function (p) { query = p; }));

  function draw() {
    var dots = scores(query, keys, false), s = scores(query, keys, scaled), w = softmax(s, temperature), out = output(w, data.values);
    hands.forEach(function (place) { place(); });
    arrow.setAttribute("d", "M0 0L" + px(query[0]) + " " + -px(query[1]));
    rows.forEach(function (row, i) {
      row.dot.textContent = say(dots[i]);
      row.score.textContent = say(s[i] / temperature);
      row.bar.style.width = "calc(" + w[i].toFixed(4) + " * (100% - 3rem))";
      row.weight.textContent = say(w[i]);
      loads[i].setAttribute("r", (14 * Math.sqrt(w[i])).toFixed(2));
      loads[i].setAttribute("cy", (-2 - 14 * Math.sqrt(w[i])).toFixed(2));
    });
    var x = along(out);
    pivot.setAttribute("d", "M" + x + " 2l-7 11h14z");
    number.setAttribute("x", Math.max(32, Math.min(208, x)));
    number.textContent = "output " + say(out);
    beam.setAttribute("aria-label", "The values on a line, loaded with their weights; the output " + say(out) + " is where it balances");
    shown.textContent = say(temperature);
    clearTimeout(timer);
    timer = setTimeout(function () { words.textContent = sentence(w, out); }, words.textContent ? 400 : 0);
  }

  function sentence(w, out) {
    var order = w.map(function (_, s) { return s; }).sort(function (a, b) { return w[b] - w[a]; });
    var shares = order.map(function (s) { return NAMES[s] + " " + Math.round(100 * w[s]) + " %"; });
    return "The query is at x " + say(query[0], 1) + ", y " + say(query[1], 1) + ". It takes " + shares.join(", ") + ". The output is " + say(out) + ".";
  }

  function start() {
    query = data.query.slice();
    keys = data.keys.map(function (k) { return k.slice(); });
    temperature = data.temperature;
    scaled = data.scaled;
    slider.value = Math.log10(temperature);
    box.checked = scaled;
    draw();
  }
  slider.addEventListener("input", function () { temperature = Math.pow(10, Number(slider.value)); draw(); });
  box.addEventListener("change", function () { scaled = box.checked; draw(); });
  reset.addEventListener("click", start);
  start();
  el.lastElementChild.replaceChildren(root);
}
