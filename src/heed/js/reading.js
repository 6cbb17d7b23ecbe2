// mount(el, data): tables of weights become maps to point at. A square's area is the weight.
// data.names = one name a table, data.marked = true places are outlined.

function mount(el, data) {
  if (!el || el.dataset.ready) return;
  el.dataset.ready = "1";
  var boxes = [].slice.call(el.querySelectorAll(".rd-scroll")), chosen = 0, row = 0;

  function make(tag, parent, text) {
    var e = document.createElement(tag);
    if (text) e.textContent = text;
    if (parent) parent.append(e);
    return e;
  }

  var strip = document.createElement("div");
  strip.style.cssText = "display:flex;flex-wrap:wrap;gap:.4rem;margin-bottom:.5rem";
  var tabs = data.names.map(function (name, n) {
    var b = make("button", strip, name);
    b.type = "button";
    b.addEventListener("click", function () { show(n); });
    return b;
  });
  if (tabs.length > 1) boxes[0].before(strip);
  var legend = make("p", null, "The area of a square is the weight" +
    (data.marked ? ", a dashed frame the true place" : "") + ". Point at a row.");
  legend.style.cssText = "margin:0 0 .3rem;font-size:.9rem";
  boxes[0].before(legend);
  var said = make("p", boxes[0].parentNode);
  said.className = "rd-said";
  said.setAttribute("role", "status");

  var maps = boxes.map(function (box) {
    var table = box.querySelector("table"), map = { rows: [], heads: [] };
    table.classList.add("live");
    table.caption.hidden = true;
    map.heads = [].slice.call(table.tHead.rows[0].cells, 1);
    if (map.heads.map(function (th) { return th.textContent; }).join("  ").length > 60) {
      map.heads.forEach(function (th) { th.style.writingMode = "vertical-rl"; });
    }
    map.rows = [].map.call(table.tBodies[0].rows, function (tr, n) {
      var word = tr.cells[0].textContent, button = document.createElement("button");
      button.type = "button";
      button.textContent = word;
      tr.cells[0].replaceChildren(button);
      var cells = [].slice.call(tr.cells, 1), weights = cells.map(function (td) {
        var weight = +td.textContent, square = document.createElement("i");
        var text = document.createElement("span"), side = 1.6 * Math.sqrt(weight);
        text.textContent = td.textContent;
        square.style.width = square.style.height = side.toFixed(2) + "rem";
        td.title = td.textContent;
        td.replaceChildren(square, text);
        return weight;
      });
      var right = cells.map(function (td) { return td.classList.contains("right"); });
      ["mouseenter", "click"].forEach(function (e) {
        tr.addEventListener(e, function () { point(n); });
      });
      button.addEventListener("focus", function () { point(n); });
      return { tr: tr, word: word, weights: weights, right: right };
    });
    return map;
  });

  // A word, with its place if it stands there twice.
  function named(map, i) {
    var word = map.heads[i].textContent;
    var twice = map.heads.some(function (th, j) { return j !== i && th.textContent === word; });
    return twice ? word + " (place " + (i + 1) + ")" : word;
  }
  function point(n) {
    row = n;
    var map = maps[chosen], one = map.rows[n];
    map.rows.forEach(function (r, i) { r.tr.classList.toggle("on", i === n); });
    map.heads.forEach(function (th, i) { th.classList.toggle("read", one.weights[i] >= 0.2); });
    var order = one.weights.map(function (w, i) { return i; })
      .filter(function (i) { return one.weights[i] >= 0.05; })
      .sort(function (a, b) { return one.weights[b] - one.weights[a]; }).slice(0, 4);
    var text = order.map(function (i) {
      return named(map, i) + " " + one.weights[i].toFixed(2);
    }).join(", ");
    var true_ = map.heads.map(function (th, i) { return one.right[i] ? named(map, i) : ""; })
      .filter(Boolean).join(", ");
    said.textContent = one.word + " reads " + (text || "nothing above 0.05") + "." +
      (data.marked ? " True place: " + (true_ || "none") + "." : "");
  }
  function show(n) {
    chosen = n;
    boxes.forEach(function (box, i) { box.hidden = i !== n; });
    tabs.forEach(function (b, i) {
      b.style.fontWeight = i === n ? "700" : "400";
      b.style.borderWidth = i === n ? "2px" : "1px";
      b.setAttribute("aria-pressed", i === n ? "true" : "false");
    });
    point(row);
  }
  show(0);
}
