// mount(el, data) draws the questions of data = {id, questions}. No imports, no network.
// A question has options [{t, why, ok}], or answer, tol, shown, wrong [{answer, why}], or words.
// Every answer that counts is told to the page: document hears "heed:answer" {id, ok, tries}.

// "1/6", "0,17", "0.17", "17 %", "1e-3", "−2", "1,024": every number that the text may mean.
function numbers(text) {
  var t = text.replace(/[\u2212\u2012\u2013]/g, "-").replace(/[\s\u00a0\u202f_]/g, "").replace(/^\+/, "");
  var percent = /%$/.test(t), parts = (percent ? t.slice(0, -1) : t).split("/");
  if (parts.length > 2) return [];
  var tops = readings(parts[0]), unders = parts.length === 2 ? readings(parts[1]) : [1], found = [];
  tops.forEach(function (a) {
    unders.forEach(function (b) { if (b !== 0) found.push(a / b / (percent ? 100 : 1)); });
  });
  return found;
}

function readings(x) {
  var found = [];
  if (/^-?(\d+([.,]\d*)?|[.,]\d+)(e[-+]?\d+)?$/i.test(x)) found.push(Number(x.replace(",", ".")));
  if (/^-?\d{1,3}(,\d{3})+(\.\d+)?$/.test(x)) found.push(Number(x.replace(/,/g, "")));
  if (/^-?\d{1,3}(\.\d{3})+(,\d+)?$/.test(x)) found.push(Number(x.replace(/\./g, "").replace(",", ".")));
  return found;
}

function near(text, answer, tol) {
  return numbers(text).some(function (v) { return Math.abs(v - answer) <= tol + 1e-9 * Math.abs(answer); });
}

function plain(word) {
  return word.normalize("NFKC").toLowerCase().replace(/[-\s]+/g, " ").replace(/^[\s"'.,;:]+|[\s"'.,;:]+$/g, "");
}

globalThis.heedQuiz = { numbers: numbers, near: near, plain: plain };

function mount(el, data) {
  if (!el || el.dataset.ready) return;
  el.dataset.ready = "1";
  var css = document.createElement("style"), box = document.createElement("div");
  var total = data.questions.length, firsts = 0, rights = 0;
  var serial = globalThis.heedSerial = (globalThis.heedSerial || 0) + 1;
  css.textContent =
    ".xp-q{margin:0 0 1.2rem;padding:0 0 0 .8rem;border:0;border-left:.25rem solid var(--xp-line);min-width:0}" +
    ".xp-q[data-state=right]{border-left-color:var(--xp-good)}.xp-q[data-state=wrong]{border-left-color:var(--xp-bad)}" +
    ".xp-q .xp-ask{font-weight:600;margin:0}.xp-q .xp-n{display:block;font-weight:400;font-size:.85rem}" +
    ".xp-q label{display:flex;gap:.55rem;align-items:baseline;padding:.3rem 0;margin:0;font-weight:400;cursor:pointer}" +
    ".xp-q input[type=radio]{flex:none;margin:0;width:1rem;height:1rem;accent-color:var(--xp-accent)}" +
    ".xp-row{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;margin:.3rem 0}.xp-row label{align-items:center}" +
    ".xp-say{margin:.3rem 0 0;min-height:1.5em}.xp-q[data-state=right] .xp-say strong{color:var(--xp-good)}" +
    ".xp-q[data-state=wrong] .xp-say strong{color:var(--xp-bad)}.xp-end{display:flex;flex-wrap:wrap;gap:.8rem;align-items:center;margin:0}";

  function make(tag, name, html) {
    var e = document.createElement(tag);
    if (name) e.className = name;
    if (html !== undefined) e.innerHTML = html;
    return e;
  }

  var end = make("p", "xp-end"), count = make("span"), over = make("button", "", "Start over");
  over.type = "button";
  function score() {
    count.textContent = rights + " of " + total + " right" + (rights ? ", " + firsts + " at the first try" : "") + ".";
    over.hidden = !box.querySelector("[data-state]");
  }

  function ask(q, k) {
    var f = make("div", "xp-q"), say = make("p", "xp-say"), row = make("div", "xp-row");
    var check = make("button", "", "Check"), show = make("button", "", "Show the answer");
    var fields = [], tries = 0, done = false;
    var head = make("p", "xp-ask", '<span class="xp-n">Question ' + (k + 1) + " of " + total + "</span> " + q.q);
    head.id = el.id + "-" + serial + "-" + k;
    f.setAttribute("role", q.options ? "radiogroup" : "group");
    f.setAttribute("aria-labelledby", head.id);
    f.append(head);
    check.type = show.type = "button";
    show.hidden = true;
    say.setAttribute("role", "status");

    function tell(state, head, why) {
      f.dataset.state = state;
      say.innerHTML = "<strong>" + head + "</strong> " + (why || "");
    }
    function judged(ok, why) {
      tries += 1;
      tell(ok ? "right" : "wrong", ok ? "Right." : "Not yet.", why);
      if (ok && !done) { done = true; rights += 1; if (tries === 1) firsts += 1; }
      show.hidden = ok || done || tries < 2 || !!q.options;
      check.textContent = ok ? "Check" : "Try again";
      document.dispatchEvent(new CustomEvent("heed:answer", { detail: { id: data.id + "/" + k, ok: ok, tries: tries } }));
      score();
    }
    function field(label, size) {
      var l = make("label"), input = make("input");
      input.type = "text";
      input.autocomplete = "off";
      input.spellcheck = false;
      input.addEventListener("keydown", function (e) { if (e.key === "Enter") { e.preventDefault(); check.click(); } });
      l.append(label + " ", input);
      row.append(l);
      fields.push(input);
      return input;
    }

    if (q.options) {
      q.options.forEach(function (o, i) {
        var l = make("label"), r = make("input");
        r.type = "radio";
        r.name = head.id;
        r.value = i;
        l.append(r, make("span", "", o.t));
        f.append(l);
        fields.push(r);
      });
    } else if (q.words) {
      q.words.forEach(function (w, i) { field(q.words.length > 1 ? "Word " + (i + 1) : "The missing word"); });
    } else {
      field("Your answer").inputMode = "text"; // a fraction needs a slash, which number pads lack
    }

    check.addEventListener("click", function () {
      if (q.options) {
        var picked = fields.findIndex(function (r) { return r.checked; });
        if (picked < 0) return tell("", "", "Pick one first.");
        return judged(q.options[picked].ok, q.options[picked].why);
      }
      if (fields.some(function (i) { return !i.value.trim(); })) return tell("", "", "Write something first.");
      if (q.words) {
        var ok = q.words.map(function (w, i) { return w.map(plain).indexOf(plain(fields[i].value)) >= 0; });
        var bad = ok.indexOf(false), many = q.words.length > 1 && bad >= 0 && ok.indexOf(true) >= 0;
        return judged(bad < 0, bad < 0 ? q.why : (many ? "Word " + (bad + 1) + " does not fit. " : "") + (q.hint || ""));
      }
      var text = fields[0].value;
      if (!numbers(text).length) return tell("", "", "Write a number, such as 0.25 or 1/4.");
      if (near(text, q.answer, q.tol)) return judged(true, q.why);
      var known = q.wrong.find(function (w) { return near(text, w.answer, q.tol); });
      judged(false, known ? known.why : q.hint);
    });
    show.addEventListener("click", function () {
      var answer = q.words ? q.words.map(function (w) { return w[0]; }) : [q.shown];
      fields.forEach(function (i, n) { i.value = answer[n]; });
      show.hidden = true;
      tell("", "The answer: ", answer.join(", ") + ". " + q.why);
    });
    f.append(row, say);
    row.append(check, show);
    box.append(f);
  }

  over.addEventListener("click", function () {
    rights = firsts = 0;
    box.replaceChildren();
    data.questions.forEach(ask);
    score();
    box.querySelector("input").focus();
  });
  data.questions.forEach(ask);
  end.append(count, over);
  el.lastElementChild.replaceChildren(css, box, end);
  score();
}
