// mount(el, data): an empty block, a list for each box, and a judge that names the first mistake.
// data = {kind, parts, boxes, skips, why, task, svg, ys, lanes}: boxes and skips are the right ones.
// A skip is [point it leaves at, box it joins]; point n stands below box n + 1; boxes count from 1.

// {ok, text, box, skip}: ok is null while something is missing; look at this box or skip, unless 0.
function judge(asked, boxes, skips) {
  var pre = asked.kind === "pre-norm", want = asked.boxes, k, n;
  function say(ok, text, box, skip) { return { ok: ok, text: text, box: box || 0, skip: skip || 0 }; }
  function at(n) { return "Box " + (n + 1) + ": "; }
  function many(part) { return boxes.filter(function (b) { return b === part; }).length; }

  n = boxes.indexOf("");
  if (n >= 0) return say(null, "Box " + (n + 1) + " is still empty.", n + 1);
  for (n = 0; n < 6; n++) {
    if (boxes[n] === "softmax") return say(false, at(n) + "the softmax works on scores, inside attention. There is none on the way of the stream.", n + 1);
    if (boxes[n] === "embedding") return say(false, at(n) + "the embedding stands once, before the first block. In here everything is a vector already.", n + 1);
  }
  if (!many("attention")) return say(false, "Nothing mixes the positions: without attention each one sees only itself.");
  if (!many("feed-forward")) return say(false, "The feed-forward layer is missing: nothing works on what each position has gathered.");
  if (many("add") < 2) return say(false, "There are two layers, attention and feed-forward, and each needs an add where its skip joins.");
  if (many("norm") < 2) return say(false, "There are two layers, attention and feed-forward, and each needs a norm " + (pre ? "before it." : "after its add."));

  n = want.findIndex(function (part, i) { return part !== boxes[i]; });
  if (n >= 0) return say(false, at(n) + misplaced(n), n + 1);
  for (k = 0; k < 2; k++) {
    var which = k ? "upper" : "lower", start = skips[k][0], end = skips[k][1];
    if (start === null) return say(null, "The boxes are right. Where does the " + which + " skip leave?");
    if (end === null) return say(null, "The boxes are right. Where does the " + which + " skip join?");
    if (start !== asked.skips[k][0] || end !== asked.skips[k][1]) return say(false, "The " + which + " skip " + astray(k, start, end), 0, k + 1);
  }
  return say(true, asked.why);

  function misplaced(n) {
    var got = boxes[n], below = boxes[n - 1], layer = /attention|feed/;
    if (pre && want[n] === "norm" && layer.test(got) && boxes[n + 1] === "add" && boxes[n + 2] === "norm") return "from here on you norm the stream itself after adding: that is post-norm, the 2017 order.";
    if (!pre && layer.test(want[n]) && got === "norm" && layer.test(boxes[n + 1]) && below !== "norm") return "here you norm what goes into the layer: that is pre-norm, the order of GPT-2. In post-norm the layer reads the stream as it is.";
    if (got === "norm" && below === "norm") return "two norms in a row, and the second has next to nothing left to do.";
    if (layer.test(got) && layer.test(want[n])) return "attention comes first, so that the feed-forward layer works on what each position has gathered.";
    if (got === "add") return "there is nothing to add yet: no layer has run since the skip left.";
    if (want[n] === "add") return "what " + (below === "attention" ? "attention" : "the feed-forward layer") + " made must be added to the stream before anything else reads it.";
    if (want[n] === "norm" && pre) return "this layer reads the bare stream. In pre-norm a norm stands before every layer.";
    if (want[n] === "norm") return "in post-norm the norm comes right after the add, on the stream itself.";
    return "in post-norm a layer reads the stream as it is, and the norm comes after the add.";
  }
  function astray(k, start, end) {
    var base = asked.skips[k][0], below = boxes[start - 1];
    if (boxes[end - 1] !== "add") return "joins at box " + end + ", which is " + (boxes[end - 1] === "attention" ? "attention" : "a " + boxes[end - 1]) + ": only an add takes in two branches.";
    if (end !== asked.skips[k][1]) return "joins at the add of the other layer. Each layer has its own.";
    if (start >= end) return "leaves above the add that it joins.";
    if (start > base && below === "norm") return "leaves from after the norm: the residual would be the normed copy, and the stream itself would end here.";
    if (start > base) return "leaves from after the layer: the add would get the layer's output twice, and the stream would not get past it.";
    if (boxes[start] === "norm" && boxes[start - 1] === "add") return "leaves from before the norm. In post-norm the norm stands on the stream itself, and the skip starts above it.";
    return "leaves below the first add: what attention made would not be on it.";
  }
}

globalThis.heedDrawing = { judge: judge };

function mount(el, data) {
  if (!el || el.dataset.ready) return;
  el.dataset.ready = "1";
  var serial = globalThis.heedSerial = (globalThis.heedSerial || 0) + 1, count = 0;
  var LETTERS = "abcdef", root = document.createElement("div");
  function make(tag, name, parent, text) {
    var e = document.createElement(tag);
    if (name) e.className = name;
    if (text) e.textContent = text;
    if (parent) parent.append(e);
    return e;
  }
  make("style", "", root).textContent =
    ".dr{display:flex;flex-wrap:wrap;gap:1rem 2rem}.dr-left{position:relative;flex:1 1 19rem;max-width:24rem}" +
    ".dr-left svg{display:block}.dr-left [data-bad]{stroke:var(--xp-bad);stroke-width:3}" +
    ".dr-skip{stroke:var(--xp-accent)}.dr-box{position:absolute;left:184px;right:0}.dr-right{flex:1 1 15rem;min-width:0}" +
    ".dr label{display:block;font-size:.85rem;line-height:18px;margin:0}.dr-two{margin-bottom:.5rem}" +
    ".dr select{font:inherit;font-size:1rem;color:inherit;background:transparent;display:block;width:100%;height:36px;" +
    "border:1px solid currentColor;border-radius:.35rem;padding:0 .3rem;text-overflow:ellipsis}" +
    ".dr option{color:CanvasText;background:Canvas}.dr fieldset{border:0;padding:0;margin:0 0 .8rem;min-width:0}" +
    ".dr legend{font-size:1rem;font-weight:600;padding:0;margin:0 0 .2rem}.dr-two{display:grid;grid-template-columns:1.6fr 1fr;gap:.6rem}" +
    ".dr-keys{display:flex;flex-wrap:wrap;gap:.5rem}.dr-say{min-height:6em;margin:.6rem 0 0}" +
    ".dr-say[data-state=right] strong{color:var(--xp-good)}.dr-say[data-state=wrong] strong{color:var(--xp-bad)}";
  make("p", "", root).innerHTML = data.task;
  var grid = make("div", "dr", root), left = make("div", "dr-left", grid), right = make("div", "dr-right", grid);
  left.innerHTML = data.svg;
  var svg = left.firstChild, rects = svg.querySelectorAll("rect"), paths = svg.querySelectorAll(".dr-skip");
  svg.setAttribute("role", "img");

  function choose(parent, label, options) { // the first option is no choice yet
    var cell = make("div", "", parent), l = make("label", "", cell, label), s = make("select", "", cell);
    s.id = l.htmlFor = el.id + "-" + serial + "-" + count++;
    [["", "choose"]].concat(options).forEach(function (o) { make("option", "", s, o[1]).value = o[0]; });
    s.addEventListener("change", draw);
    return s;
  }
  var lists = data.boxes.map(function (_, n) {
    var at = make("div", "dr-box", left);
    at.style.top = (data.ys[n] + data.ys[n + 1]) / 2 - 36 + "px"; // beside its box, the label above
    return choose(at, "Box " + (n + 1), data.parts.map(function (p) { return [p, p]; }));
  });
  var skips = ["Lower skip", "Upper skip"].map(function (name) {
    var set = make("fieldset", "", right);
    make("legend", "", set, name);
    var two = make("div", "dr-two", set);
    return [
      choose(two, "leaves at", data.boxes.map(function (_, n) {
        return [n, LETTERS[n] + (n ? ", above box " + n : ", below box 1")];
      })),
      choose(two, "joins at", data.boxes.map(function (_, n) { return [n + 1, "box " + (n + 1)]; })),
    ];
  });
  var keys = make("div", "dr-keys", right), said = make("p", "dr-say", right);
  said.setAttribute("role", "status");
  function button(text, act) {
    var b = make("button", "", keys, text);
    b.type = "button";
    b.addEventListener("click", act);
  }
  button("Check", function () {
    var found = judge(data, names(), ends());
    tell(found.ok === null ? "" : found.ok ? "right" : "wrong", found.ok === null ? "" : found.ok ? "Right." : "Not yet.", found.text);
    if (found.box) rects[found.box - 1].setAttribute("data-bad", "");
    if (found.skip) paths[found.skip - 1].setAttribute("data-bad", "");
  });
  button("Show the answer", function () {
    lists.forEach(function (s, n) { s.value = data.boxes[n]; });
    skips.forEach(function (pair, k) { pair.forEach(function (s, i) { s.value = data.skips[k][i]; }); });
    draw();
    tell("", "The answer.", data.why);
  });
  button("Start over", function () {
    lists.concat(skips.flat()).forEach(function (s) { s.value = ""; });
    draw();
    lists[0].focus();
  });

  function tell(state, head, text) {
    said.dataset.state = state;
    said.innerHTML = (head ? "<strong>" + head + "</strong> " : "") + (text || "");
  }
  function names() { return lists.map(function (s) { return s.value; }); }
  function ends() {
    return skips.map(function (pair) { return pair.map(function (s) { return s.value === "" ? null : Number(s.value); }); });
  }
  function draw() {
    tell("", "", "");
    var words = names().map(function (part, n) {
      rects[n].removeAttribute("data-bad");
      rects[n].nextSibling.textContent = part;
      return "box " + (n + 1) + " " + (part || "empty");
    });
    ends().forEach(function (skip, k) {
      paths[k].removeAttribute("data-bad");
      var start = skip[0], end = skip[1], whole = start !== null && end !== null, x = data.lanes[k];
      var y = whole ? (data.ys[end - 1] + data.ys[end]) / 2 : 0, edge = Number(rects[0].getAttribute("x"));
      var middle = edge + rects[0].getAttribute("width") / 2;
      paths[k].setAttribute("d", whole ? "M" + middle + " " + data.ys[start] + "H" + x + "V" + y + "H" + edge + "m-7 -5l7 5l-7 5" : "");
      if (whole) words.push((k ? "upper" : "lower") + " skip from " + LETTERS[start] + " to box " + end);
    });
    svg.setAttribute("aria-label", "The block from bottom to top: " + words.join(", ") + ".");
  }
  draw();
  el.lastElementChild.replaceChildren(root);
}
