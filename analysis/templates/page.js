"use strict";

// Everything that comes from runs reaches the page through textContent: it is shown, never parsed.
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/* Tables: a click sorts, a second click turns the order round, a third restores it. Cells without a value stay last. */

function sortable(table) {
  const body = table.tBodies[0], given = [...body.rows];
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const keys = new Map(given.map(row => [row, row.cells[column].dataset.sort]));
    const filled = [...keys.values()].filter(key => key !== "");
    const numeric = filled.length > 0 && filled.every(key => !Number.isNaN(Number(key)));
    const orders = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
    const order = [...orders, "none"][["none", ...orders].indexOf(head.getAttribute("aria-sort"))];
    const compare = (a, b) => numeric ? (Number(a) > Number(b)) - (Number(a) < Number(b)) : a.localeCompare(b);
    const rows = [...given];
    if (order !== "none") rows.sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return (order === "ascending" ? 1 : -1) * compare(a, b);
    });
    heads.forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
    body.append(...rows);
  }));
}
document.querySelectorAll(".table table").forEach(sortable);

/* The section in view, in the bar above. */

const links = new Map([...document.querySelectorAll("nav a")].map(a => [a.hash.slice(1), a]));
const watcher = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting || !links.has(target.id)) continue;
    links.forEach((link, id) => id === target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
    const bar = links.get(target.id).closest("ul"), link = links.get(target.id);
    bar.scrollLeft = link.offsetLeft - (bar.clientWidth - link.offsetWidth) / 2;
  }
}, { rootMargin: "-20% 0px -75% 0px" });
document.querySelectorAll("main > section").forEach(section => watcher.observe(section));

/* Rollouts. */

const CHANNELS = {
  entropy: { title: "Entropy", unit: " nats", value: (r, i) => r.entropy?.[i] },
  advantage: { title: "Advantage", value: (r, i) => r.advantage?.[i], signed: 0 },
  factor: { title: "Factor", long: "Modulation factor", value: (r, i) => r.factor?.[i], signed: 1 },
  surprisal: { title: "Surprisal", unit: " nats", value: (r, i) => Math.max(0, -r.log_prob[i]) },
  kl_coefficient: { title: "KL penalty", value: (r, i) => r.kl_coefficient?.[i] },
};
const MOMENTS = { first: "First update", last: "Last update", final: "Final evaluation" };
const WORDS = {
  correct: "✓ correct", wrong: "✗ wrong", no_answer: "✗ no answer", truncated: "✗ cut off by the token limit",
  gold_unparsable: "✗ reference answer unreadable", timeout: "✗ check timed out", error: "✗ check failed",
};
const MINUS = "\u2212";
const shown = (value, digits = 3) => String(Number(value.toPrecision(digits))).replace("-", MINUS);

function viewer(data) {
  const find = id => document.getElementById(id);
  const runs = data.runs.map(run => ({ ...run, moments: moments(run.rows) }));
  const state = { arm: 0, moment: "first", item: null, channel: "entropy" };
  const common = scalesOf(runs), own = runs.map(run => scalesOf([run]));
  // Colours of all arms and moments can be compared, but for factors, whose size is the method's own choice.
  const reachOf = name => name === "factor" ? own[state.arm][name] : common[name];

  function moments(rows) {
    const steps = rows.filter(row => row.phase === "training").map(row => row.step);
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    const at = (phase, step) => rows.filter(row => row.phase === phase && (step === null || row.step === step));
    return { first: at("training", first), last: first === last ? [] : at("training", last), final: at("evaluation", null) };
  }

  function scalesOf(some) {
    return Object.fromEntries(Object.entries(CHANNELS).map(([name, channel]) => [name, scaleOf(channel, some)]));
  }

  // The largest distance of a value from the channel's middle.
  function scaleOf(channel, some) {
    let reach = 0;
    for (const run of some) for (const row of run.rows) for (const rollout of row.rollouts)
      rollout.tokens.forEach((_, i) => {
        const value = channel.value(rollout, i);
        if (value != null) reach = Math.max(reach, Math.abs(value - (channel.signed ?? 0)));
      });
    return reach;
  }

  function colour(name, value) {
    const channel = CHANNELS[name], reach = reachOf(name), share = reach ? (value - (channel.signed ?? 0)) / reach : 0;
    const base = channel.signed === undefined ? "--heat" : share > 0 ? "--plus" : "--minus";
    return `color-mix(in oklab, var(${base}) ${(85 * Math.min(1, Math.abs(share))).toFixed(1)}%, transparent)`;
  }

  const rowsNow = () => runs[state.arm].moments[state.moment];
  const rowNow = () => rowsNow().find(row => row.item === state.item);
  const has = (name, rows) => rows.some(row => row.rollouts.some(r => r.tokens.some((_, i) => CHANNELS[name].value(r, i) != null)));

  function radios(place, name, options) {
    const box = element("div", { className: "options" });
    for (const [value, title] of options) {
      const input = element("input", { type: "radio", name, value });
      input.addEventListener("change", () => { state[name] = value; settle(); });
      box.append(element("label", {}, input, title));
    }
    place.append(box);
  }

  // Keeps the state on something that exists, then shows it.
  function settle() {
    const run = runs[state.arm];
    if (!run.moments[state.moment].length) state.moment = Object.keys(MOMENTS).find(name => run.moments[name].length);
    if (!rowNow()) state.item = rowsNow()[0].item;
    if (!has(state.channel, rowsNow())) state.channel = has("entropy", rowsNow()) ? "entropy" : "surprisal";
    for (const input of document.querySelectorAll("#viewer input")) {
      input.checked = state[input.name] === input.value;
      input.disabled = input.name === "moment" ? !run.moments[input.value].length : !has(input.value, rowsNow());
    }
    find("choice-arm").value = String(state.arm);
    listProblems();
    showProblem();
    find("readout").textContent = "Point at a token, or step through an answer with the arrow keys.";
  }

  function listProblems() {
    const held = document.activeElement?.closest?.("#problems button")?.dataset.item;
    find("problems").replaceChildren(...rowsNow().map(row => {
      const button = element("button", { type: "button", title: row.prompt },
        element("span", { className: "text" }, row.prompt),
        element("span", { className: "share" }, `${row.c}/${row.n}`),
        element("span", { className: "family" }, row.family));
      button.dataset.item = row.item;
      button.setAttribute("aria-current", String(row.item === state.item));
      button.addEventListener("click", () => { state.item = row.item; settle(); });
      return element("li", {}, button);
    }));
    if (held !== undefined) [...document.querySelectorAll("#problems button")].find(b => b.dataset.item === held)?.focus();
  }

  function showProblem() {
    const row = rowNow(), run = runs[state.arm];
    const when = row.phase === "evaluation" ? `after ${row.step} steps` : `step ${row.step + 1}`;
    const all = row.all_n > row.n ? `; ${row.all_c} of ${row.all_n} over all seeds` : "";
    const kept = row.rollouts.length < row.n ? `, ${row.rollouts.length} shown` : "";
    find("problem").replaceChildren(
      element("h3", {}, row.prompt),
      element("p", { className: "about" }, `Answer ${row.answer} · ${row.item} · ${run.arm}, seed ${run.seed}, ${when} · ${row.c} of ${row.n} correct${kept}${all}`),
      others(row), legend(),
      element("ol", { className: "answers" }, ...row.rollouts.map(answer)));
  }

  // The same problem at the same moment in the other arms.
  function others(row) {
    const box = element("div", { className: "others" });
    runs.forEach((run, number) => {
      const same = run.moments[state.moment].find(other => other.item === row.item);
      if (!same) return;
      const button = element("button", { type: "button" });
      const dot = element("span", { className: "dot" });
      dot.style.background = `var(--c${run.colour.slice(1)})`;
      button.append(dot, `${run.arm} ${same.c}/${same.n}`);
      button.setAttribute("aria-pressed", String(number === state.arm));
      button.addEventListener("click", () => { state.arm = number; settle(); [...document.querySelectorAll(".others button")].find(b => b.getAttribute("aria-pressed") === "true")?.focus(); });
      box.append(button);
    });
    return box;
  }

  function legend() {
    const channel = CHANNELS[state.channel], reach = reachOf(state.channel), middle = channel.signed;
    const low = middle === undefined ? 0 : middle - reach;
    const stops = Array.from({ length: 9 }, (_, i) => low + i / 8 * ((middle ?? 0) + reach - low));
    const bar = element("span", { className: "bar" });
    bar.style.background = `linear-gradient(to right in oklab, ${stops.map(value => colour(state.channel, value)).join(",")})`;
    const end = value => shown(value, 2) + (channel.unit ?? "");
    return element("p", { className: "legend" }, element("span", {}, channel.long ?? channel.title), element("span", {}, end(low)), bar, element("span", {}, end((middle ?? 0) + reach)));
  }

  function answer(rollout) {
    const says = element("p", { className: "says" }, element("span", { className: rollout.verdict === "correct" ? "is-correct" : "is-not" }, WORDS[rollout.verdict] ?? rollout.verdict));
    if (rollout.advantage_of_rollout != null) says.append(element("span", {}, `advantage ${rollout.advantage_of_rollout > 0 ? "+" : ""}${shown(rollout.advantage_of_rollout)}`));
    const cut = rollout.tokens.length < rollout.length ? `, the first ${rollout.tokens.length} shown` : "";
    says.append(element("span", {}, `${rollout.length} token${rollout.length === 1 ? "" : "s"}${cut}`));
    const text = element("p", { className: "tokens", tabIndex: 0, ariaLabel: `Answer: ${rollout.tokens.join("")}` });
    text.setAttribute("role", "group");
    rollout.tokens.forEach((token, i) => {
      const span = element("span", { className: /^<.+>$/.test(token) ? "special" : "" }, token);
      const value = CHANNELS[state.channel].value(rollout, i);
      if (value != null) span.style.background = colour(state.channel, value);
      span.addEventListener("pointerenter", () => choose(text, rollout, i));
      span.addEventListener("click", () => choose(text, rollout, i));
      text.append(span);
    });
    text.addEventListener("keydown", event => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const now = [...text.children].findIndex(span => span.classList.contains("chosen"));
      choose(text, rollout, Math.min(Math.max(now + move, 0), rollout.tokens.length - 1));
    });
    return element("li", {}, says, text);
  }

  function choose(text, rollout, i) {
    document.querySelectorAll(".tokens .chosen").forEach(span => span.classList.remove("chosen"));
    text.children[i].classList.add("chosen");
    const told = [`probability ${shown(Math.exp(rollout.log_prob[i]))}`];
    for (const [name, channel] of Object.entries(CHANNELS)) {
      const value = channel.value(rollout, i);
      if (value != null && name !== "surprisal") told.push(`${channel.title.toLowerCase()} ${shown(value)}${channel.unit ?? ""}`);
    }
    find("readout").replaceChildren(element("b", {}, rollout.tokens[i]), ` · ${told.join(" · ")}`);
  }

  radios(find("choice-moment"), "moment", Object.entries(MOMENTS));
  radios(find("choice-channel"), "channel", Object.entries(CHANNELS).filter(([name]) => name !== "kl_coefficient" || runs.some(run => has(name, run.rows))).map(([name, channel]) => [name, channel.title]));
  find("choice-arm").append(...runs.map((run, number) => element("option", { value: String(number) }, run.arm)));
  find("choice-arm").addEventListener("change", event => { state.arm = Number(event.target.value); settle(); });
  find("viewer").hidden = false;
  settle();
}
const traces = document.getElementById("traces");
if (traces) viewer(JSON.parse(traces.textContent));
