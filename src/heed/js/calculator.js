// mount(el, data): sizes in, costs out, each beside its formula. No kernel, no network.
// data = {presets: [{layers, ...}], parts: [[legend, [[key, kind, label, start], ...]], ...], bytes,
// devices: [[name, GB, TFLOP/s, TB/s], ...]}.

// s holds the sizes of a preset, batch, bytes and tokens. All are BigInt: whole numbers stay exact.
function count(s) {
  var L = s.layers, C = s.width, F = s.ff, T = s.length, b = s.biases, V = s.vocab;
  var wide = s.heads * s.head, kv = s.kv_heads * s.head, seen = s.window && s.window < T ? s.window : T;
  var attention = 2n * C * wide + 2n * C * kv, expert = (2n + s.gated) * C * F, router = s.experts > 1n ? C * s.experts : 0n;
  var wholeExpert = expert + b * ((1n + s.gated) * F + C);
  var layer = attention + b * (wide + 2n * kv + C) + s.experts * wholeExpert + router + (2n + 2n * b) * C;
  var N = L * layer + (2n - s.tied) * V * C + s.positions * C + (1n + b) * C;
  var matrices = 2n * (L * (attention + s.active * expert + router) + V * C), token = matrices + 4n * L * T * wide;
  var active = N - L * (s.experts - s.active) * wholeExpert, cache = 2n * L * kv * s.bytes;
  var visited = s.active * s.batch < s.experts ? s.active * s.batch : s.experts;
  var read = N - L * (s.experts - visited) * wholeExpert - ((1n - s.tied) * V + s.positions) * C;
  return {
    parameters: N, rule: 12n * L * C * C + V * C, active: active,
    forward: s.batch * T * token, token: 3n * token, six: 6n * active,
    weights: N * s.bytes, cache_token: cache, text: cache * seen, cache: cache * seen * s.batch, all: 3n * token * s.tokens,
    trained_weights: 2n * N, gradients: 2n * N, adam: 12n * N, training: 16n * N,
    step: s.batch * (matrices + 4n * L * seen * wide), moved: read * s.bytes + cache * seen * s.batch,
  };
}

// What one device serves: device = [name, GB, TFLOP/s, TB/s].
function serve(s, n, device) {
  var room = BigInt(device[1]) * 10n ** 9n - n.weights, each = s.batch * n.cache_token;
  var moving = Number(n.moved) / (device[3] * 1e12), computing = Number(n.step) / (device[2] * 1e12), least = Math.max(moving, computing);
  return {
    fit: room > 0n ? room / n.text : 0n, even: (2n * n.weights + each) / (2n * each),
    ratio: Number(n.step) / Number(n.moved), memory: moving > computing, least: least, rate: Number(s.batch) / least,
  };
}

// "4,096", "4096", "3e11": the whole number a text means, or what is wrong with it in words.
function whole(text, least) {
  var t = text.trim().replace(/^\u2212/, "-"), exp = /^(\d+)(?:\.(\d+))?e\+?(\d\d?)$/i.exec(t), n;
  if (!t) return "Write a number.";
  if (/^-/.test(t)) return "It cannot be negative.";
  if (/^\d{1,3}([,_ \u00a0\u202f]\d{3})+$/.test(t)) n = BigInt(t.replace(/\D/g, ""));
  else if (/^\d+$/.test(t)) n = BigInt(t);
  else if (exp && Number(exp[3]) >= (exp[2] || "").length) n = BigInt(exp[1] + (exp[2] || "") + "0".repeat(exp[3] - (exp[2] || "").length));
  else return "Write a whole number, such as 4,096 or 3e11.";
  if (n < least) return "At least " + least + ".";
  return n > 10n ** 18n ? "At most 1e18." : n;
}

function group(n) { return String(n).replace(/\B(?=(\d{3})+$)/g, ","); }

// {s, use, wrong}: the sizes and the share of the peak that texts mean, and what is wrong, by name.
function read(texts) {
  var s = {}, wrong = {}, use = /^\d+([.]\d+)?\s*%?$/.test(texts.use.trim()) ? parseFloat(texts.use) : 0;
  Object.keys(texts).forEach(function (k) {
    if (k === "use" || (k === "head" && !texts.head.trim())) return;
    var n = whole(texts[k], /^(positions|window|gated|biases|tied)$/.test(k) ? 0n : 1n);
    if (typeof n === "string") wrong[k] = n; else s[k] = n;
  });
  if (s.width && s.heads && !texts.head.trim()) {
    if (s.width % s.heads) wrong.head = "Width " + group(s.width) + " does not divide by " + group(s.heads) + " heads. Mend one, or type a head width.";
    else s.head = s.width / s.heads;
  }
  if (s.heads && s.kv_heads && s.heads % s.kv_heads) wrong.kv_heads = group(s.heads) + " query heads cannot share " + group(s.kv_heads) + " equally.";
  if (s.experts && s.active > s.experts) wrong.active = s.experts > 1n ? "There are only " + group(s.experts) + " experts." : "There is only 1 expert.";
  if (s.positions && s.length > s.positions) wrong.length = "The model learned only " + group(s.positions) + " positions.";
  if (!(use > 0 && use <= 100)) wrong.use = "More than 0 and at most 100.";
  return { s: s, use: use, wrong: wrong };
}

// The training's days; one device does tflops at its peak.
function days(all, devices, tflops, use) { return Number(all) / (Number(devices) * tflops * 1e12 * use / 100 * 86400); }

globalThis.heedCalculator = { count: count, serve: serve, read: read, days: days };

// Three digits and a word: 124 million, 9.22 × 10²², 12.6 GiB.
function short(x, units) {
  var step = units ? 1024 : 1000, n = 0;
  x = Number(x);
  if (!units && x >= 9.995e14) {
    var e = x.toExponential(2).split("e+");
    return e[0] + " × 10" + e[1].replace(/\d/g, function (d) { return "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]; });
  }
  units = units || ["", " thousand", " million", " billion", " trillion"];
  for (; n < units.length - 1 && Math.max(x, Number(x.toPrecision(3))) >= step; n++) x /= step;
  return (x < 1000 ? Number(x.toPrecision(3)) : group(Math.round(x))) + units[n];
}
function inBytes(n) { return short(n, [" bytes", " KiB", " MiB", " GiB", " TiB"]); }
function inTime(d) { return d < 1 ? short(24 * d, [" hours"]) : d < 1000 ? short(d, [" days"]) : short(d / 365.25, [" years"]); }

// In five groups of one unit: name, key, value, formula, and a unit of its own. s are the sizes, n is what `count` makes of them.
function report(s, n, time, device, use) {
  var matrices = "2CHD + 2CGD", expert = s.gated ? "3CF" : "2CF", many = s.experts > 1n;
  var full = expert + (s.biases ? (s.gated ? " + 2F + C" : " + F + C") : "");
  var layer = matrices + (s.biases ? " + HD + 2GD + C" : "") + " + " + (many ? "E(" + full + ") + CE" : full) + (s.biases ? " + 4C" : " + 2C");
  var ends = (s.tied ? "VC" : "2VC") + (s.positions ? " + SC" : "") + (s.biases ? " + 2C" : " + C");
  var off = 100 * (Number(n.rule) / Number(n.parameters) - 1);
  var width = s.bytes + (s.bytes > 1n ? " bytes" : " byte"), kept = s.window && s.window < s.length;
  var gb = device[1] + " GB", one = serve(s, n, device), experts = many ? "A·" + expert + " + CE" : expert;
  var tables = (s.tied ? "" : " − VC") + (s.positions ? " − SC" : ""), few = s.active * s.batch < s.experts ? " − L(E − AB)(" + full + ")" : "";
  function room(all) {
    var bytes = BigInt(device[1]) * 10n ** 9n, least = (all + bytes - 1n) / bytes;
    return "needs " + group(least) + (least > 1n ? " devices" : " device") + " of " + gb + (least > s.devices ? ", more than you have" : "");
  }
  return [["Size", "", [
    ["parameters, N", "parameters", n.parameters, "L(" + layer + ") + " + ends],
    ["rule of thumb", "rule", n.rule, "12LC² + VC, off by " + (off < 0 ? "−" : "+") + Math.abs(off).toFixed(2) + " %"],
    ["active parameters", "active", n.active, s.experts > s.active ? "N − L(E − A)(" + full + ")" : "every token meets all of them"],
  ]], ["Work", "", [
    ["FLOPs of a forward pass", "forward", n.forward, "2BT(L(" + matrices + " + " + experts + ") + VC) + 4BT²LHD; all T² scores count"],
    ["FLOPs a trained token", "token", n.token, "3 × forward ÷ BT: the way back costs twice the way there"],
    ["rule of thumb", "six", n.six, "6 × active parameters; the exact count is " + (Number(n.token) / Number(n.six)).toFixed(3) + " times that"],
  ]], ["Memory", " bytes", [
    ["weights to run it", "weights", n.weights, "N × " + width],
    ["cache a token", "cache_token", n.cache_token, "2LGD × " + width],
    ["cache in all", "cache", n.cache, (kept ? "B × window, shorter than T," : "BT") + " × the cache a token; with the weights it " + room(n.weights + n.cache)],
    ["weights in training", "trained_weights", n.trained_weights, "2N, in 16 bits"],
    ["gradients", "gradients", n.gradients, "2N, in 16 bits"],
    ["Adam", "adam", n.adam, "12N: a copy of the weights and two moments, 4 bytes each"],
    ["training in all", "training", n.training, "16N, activations come on top; " + room(n.training)],
  ]], ["Serving with one " + device[0], "", [
    ["texts that fit", "fit", one.fit, n.weights < BigInt(device[1]) * 10n ** 9n ? "(" + gb + " − weights) ÷ the cache of one text of T" : "the weights alone need more than " + gb],
    ["cache as heavy as the weights", "even", one.even, "weights ÷ (B × the cache a token)" + (s.window && s.window < one.even ? "; the window ends before" : ""), " tokens a text"],
    ["FLOPs of a decode step", "step", n.step, "2B(L(" + matrices + " + " + experts + ") + VC) + 4B" + (kept ? " × window × " : "T") + "LHD: one new token a text"],
    ["bytes of a decode step", "moved", n.moved, "(N" + tables + few + ") × " + width + " + cache" + (tables ? "; of a table only rows are read" : "") +
      (many && s.batch > 1n ? few ? "; no two texts visit one expert" : "; all experts are visited" : ""), " bytes"],
    ["FLOPs a byte", "ratio", one.ratio, "FLOPs ÷ bytes; below the ridge, " + Math.round(device[2] / device[3]) + ", the memory limits, above it the arithmetic"],
    ["a decode step takes at least", "least", 1000 * one.least, one.memory ? "bytes ÷ " + device[3] + " × 10¹² a second" : "FLOPs ÷ " + device[2] + " × 10¹² a second", " ms"],
    ["tokens a second at most", "rate", one.rate, "B ÷ the time of a step"],
  ]], ["Training", "", [
    ["FLOPs of the training", "all", n.all, "tokens × FLOPs a trained token"],
    ["time", "days", time, "FLOPs ÷ (" + group(s.devices) + " × " + device[2] + " × 10¹² a second × " + use + " % × 86,400 seconds)", " days"],
  ]]];
}

function mount(el, data) {
  if (!el || el.dataset.ready) return;
  el.dataset.ready = "1";
  var serial = globalThis.heedSerial = (globalThis.heedSerial || 0) + 1, inputs = {}, wrongs = {}, timer;
  function make(tag, name, parent, text) {
    var e = document.createElement(tag);
    if (name) e.className = name;
    if (text) e.textContent = text;
    if (parent) parent.append(e);
    return e;
  }
  function add(grid, key, kind, label, start) { // kind: text, list or tick
    var cell = make("div", "ca-" + kind, grid), l = make("label", "", cell, label);
    var e = inputs[key] = make(kind === "list" ? "select" : "input", "", cell);
    e.id = l.htmlFor = el.id + "-" + serial + "-" + key;
    if (kind === "list") start.forEach(function (o, n) { make("option", "", e, o).value = n; });
    else e.type = kind === "tick" ? "checkbox" : "text";
    if (kind === "tick") l.before(e);
    if (kind === "text") {
      e.autocomplete = "off";
      e.value = start || "";
      wrongs[key] = make("span", "ca-wrong", cell);
      wrongs[key].id = e.id + "-wrong";
    }
    e.addEventListener("input", function () { changed(key); });
  }
  var root = make("div", "ca");
  root.append(el.querySelector("style"));
  data.parts.forEach(function (part) {
    var set = make("fieldset", "", root);
    make("legend", "", set, part[0]);
    var grid = make("div", "ca-grid", set);
    part[1].forEach(function (f) { add.apply(null, [grid].concat(f)); });
  });
  inputs.head.placeholder = "C / H";
  inputs.bytes.value = 1;
  var said = make("p", "ca-said", root), results = make("div", "", root);
  said.setAttribute("role", "status");

  function fill() {
    var p = data.presets[inputs.model.value] || {};
    Object.keys(p).forEach(function (k) {
      if (inputs[k] && inputs[k].type === "checkbox") inputs[k].checked = p[k] === 1;
      else if (inputs[k]) inputs[k].value = k === "head" ? "" : group(p[k]); // empty: C / H, as in all of them
    });
  }
  function changed(key) {
    if (key === "model") fill();
    else if (key in data.presets[0] && key !== "length") inputs.model.value = data.presets.length; // your own
    var texts = {}, first = "";
    Object.keys(inputs).forEach(function (k) {
      if (inputs[k].type === "checkbox") texts[k] = inputs[k].checked ? "1" : "0";
      if (wrongs[k]) texts[k] = inputs[k].value;
    });
    texts.bytes = String(data.bytes[inputs.bytes.value]);
    var found = read(texts), s = found.s;
    Object.keys(wrongs).forEach(function (k) {
      var text = found.wrong[k] || "";
      wrongs[k].textContent = text;
      inputs[k].setAttribute("aria-invalid", String(!!text));
      inputs[k].setAttribute("aria-describedby", text ? wrongs[k].id : "");
      if (text) first = first || inputs[k].labels[0].textContent;
    });
    clearTimeout(timer);
    results.replaceChildren();
    if (first) { said.textContent = "No numbers until “" + first + "” is mended."; return; }
    var n = count(s), device = data.devices[inputs.device.value], time = days(n.all, s.devices, device[2], found.use);
    report(s, n, time, device, found.use).forEach(function (part) {
      make("p", "ca-head", results, part[0]);
      var list = make("dl", "", results);
      part[2].forEach(function (row) { show.apply(null, [list, part[1]].concat(row)); });
    });
    timer = setTimeout(function () { // once the typing rests
      said.textContent = short(n.parameters) + " parameters, " + inBytes(n.cache_token) + " of cache a token, " + inTime(time) + " of training.";
    }, said.textContent ? 500 : 0);
  }
  function show(list, unit, name, key, value, formula, own) {
    make("dt", "", list, name);
    var dd = make("dd", "", list), exact = typeof value === "bigint";
    unit = own || unit;
    make("b", "", dd, exact ? group(value) : short(value, [""])).dataset.key = key;
    dd.append(unit);
    if (unit === " bytes") dd.append(value >= 1024n ? " = " + inBytes(value) : "");
    else if (unit === " days") dd.append(value < 1 || value >= 1000 ? " = " + inTime(value) : "");
    else if (!unit && exact && value >= 1000n) dd.append(" ≈ " + short(value));
    make("span", "", dd, formula);
  }
  changed("model");
  el.lastElementChild.replaceChildren(root);
}
