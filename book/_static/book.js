/* Progress, kept on this device only: localStorage["heed.progress"] =
   {"chapters/05_scale": {done: true, earned: 60, quiz: {"ch05/0": 10}}} */
(function () {
  "use strict";
  var KEY = "heed.progress";

  function load() {
    try { return JSON.parse(localStorage.getItem(KEY)) || {}; } catch (e) { return {}; }
  }
  function save(state) {
    try { localStorage.setItem(KEY, JSON.stringify(state)); } catch (e) { /* a private window */ }
    render(state);
  }
  function entry(state, doc) {
    return (state[doc] = Object.assign({ done: false, earned: 0, quiz: {} }, state[doc]));
  }
  function points(state) {
    return Object.values(state).reduce(function (sum, chapter) {
      return Object.values(chapter.quiz || {}).reduce(function (a, b) { return a + b; }, sum + (chapter.earned || 0));
    }, 0);
  }

  function render(state) {
    var box = document.querySelector(".book-progress");
    if (!box) return;
    var links = Array.from(document.querySelectorAll(".bd-sidebar-primary a.internal"));
    var chapters = 0, done = 0;
    links.forEach(function (a) {
      var doc = /chapters\/\d\d_[^/]+(?=\.html$)/.exec(a.pathname);
      // The page that is open links to itself as "#".
      var here = document.querySelector(".chapter-meta");
      doc = doc ? doc[0] : here && a.getAttribute("href") === "#" ? here.dataset.chapter : null;
      if (!doc) return;
      chapters += 1;
      var isDone = Boolean(state[doc] && state[doc].done);
      done += isDone;
      a.parentElement.classList.toggle("nav-done", isDone);
    });
    box.innerHTML = "<label>" + done + " of " + chapters + " chapters, <b>" + points(state) + " XP</b>" +
      '<progress max="' + (chapters || 1) + '" value="' + done + '"></progress></label>';
  }

  function addButton(meta) {
    var button = document.createElement("button");
    function label() {
      var done = entry(load(), meta.dataset.chapter).done;
      button.textContent = done ? "Chapter done (undo)" : "Mark this chapter done: " + meta.dataset.xp + " XP";
    }
    button.type = "button";
    button.className = "btn btn-outline-primary done-button";
    button.addEventListener("click", function () {
      var state = load(), chapter = entry(state, meta.dataset.chapter);
      chapter.done = !chapter.done;
      chapter.earned = chapter.done ? Number(meta.dataset.xp) : 0;
      save(state);
      label();
    });
    label();
    document.querySelector("article.bd-article").appendChild(button);
  }

  document.addEventListener("heed:answer", function (event) {
    var meta = document.querySelector(".chapter-meta"), answer = event.detail, state = load();
    var chapter = entry(state, meta ? meta.dataset.chapter : location.pathname);
    if (!answer.ok || chapter.quiz[answer.id]) return;
    chapter.quiz[answer.id] = answer.tries === 1 ? 10 : 5;
    save(state);
  });
  addEventListener("storage", function (event) { if (event.key === KEY) render(load()); });

  // Deferred, so the page is there. A wide table or code box that scrolls must be reachable by keyboard.
  var meta = document.querySelector(".chapter-meta");
  if (meta) addButton(meta);
  document.querySelectorAll("div.formula").forEach(function (box) {
    if (box.scrollWidth <= box.clientWidth) box.removeAttribute("tabindex");
  });
  render(load());
})();
