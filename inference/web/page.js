// The page: asks POST /generate, shows the text as it is written, and for a number the DAG that wrote it.
// Whatever was typed or written is only ever put into text nodes, never read as HTML.

const SIGNS = { add: "+", subtract: "\u2212", multiply: "\u00d7", divide: "\u00f7", power: "^", identity: "=" };
const HUES = 8; // of page.css
const ROW = 88, HEIGHT = 36, GAP = 20, DIGIT = 9.5; // of the graph, in pixels

const $ = (id) => document.getElementById(id);

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // strings become text nodes
  return node;
}
const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function percent(p) {
  if (p < 0.0001) return "< 0.01 %";
  if (p > 0.9999) return "> 99.99 %";
  return `${(100 * p).toFixed(p < 0.01 || p > 0.99 ? 2 : 1)} %`;
}

// ---------------------------------------------------------------------------------------------------
// asking

let model = { plans: false, gate: false };
let running = new AbortController();

async function run() {
  const prompt = $("prompt").value;
  if (!prompt) return;
  running.abort();
  const mine = (running = new AbortController());
  close();
  $("problem").textContent = "";
  $("text").replaceChildren(html("span", { class: "prompt" }, prompt));
  $("text").setAttribute("aria-busy", "true");
  $("result").hidden = false;
  try {
    const [length, temperature] = [$("length").valueAsNumber, $("temperature").valueAsNumber];
    const request = { prompt, max_new_tokens: length, temperature, stream: true };
    for await (const event of events(request, mine.signal)) {
      if ("token" in event) $("text").append(event.token);
      else show(event);
    }
  } catch (error) {
    if (mine.signal.aborted) return; // another text is being written by now
    const lost = error instanceof TypeError; // what fetch throws
    $("problem").textContent = lost ? "The server does not answer: is serve.py still running?" : error.message;
    $("result").hidden = lost || $("text").childNodes.length < 2;
  }
  $("text").setAttribute("aria-busy", "false");
}

async function* events(request, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("generate", { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw new Error((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// ---------------------------------------------------------------------------------------------------
// the text

function show(answer) {
  const spans = answer.tokens.map((token, i) => {
    const gate = model.gate ? `gate ${percent(token.gate)}, ` : "";
    const title = token.gate === null ? "" : `${gate}probability ${percent(token.probability)}`;
    const written = i < answer.prompt_tokens ? "token prompt" : "token";
    const span = html("span", { class: written, title, "data-token": i }, token.text);
    span.style.setProperty("--gate", model.gate ? (token.gate ?? 0) : 0);
    return span;
  });
  const parts = [];
  let next = 0;
  for (const number of numbersOf(answer)) {
    const button = html("button", { type: "button", "aria-expanded": "false", "aria-controls": "panel" });
    button.className = number.gate > 0.5 ? "number computed" : "number";
    button.append(...spans.slice(number.first, number.last + 1));
    button.addEventListener("click", () => toggle(button, number, answer));
    parts.push(...spans.slice(next, number.first), button);
    next = number.last + 1;
  }
  $("text").replaceChildren(...parts, ...spans.slice(next));
}

// Those that the DAG can tell of, and all other runs of digits.
function numbersOf({ tokens, thoughts, unplanned }) {
  const found = [...thoughts, ...unplanned];
  const taken = (i) => found.some(({ first, last }) => first <= i && i <= last);
  const digit = (i) => /^[0-9]$/.test(tokens[i]?.text) && !taken(i);
  for (let i = 0; i < tokens.length; i++) {
    if (!digit(i)) continue;
    let last = i;
    while (digit(last + 1) || (tokens[last + 1]?.text === "." && digit(last + 2))) last++;
    found.push({ first: i, last });
    i = last;
  }
  return found.sort((a, b) => a.first - b.first);
}

function close() {
  for (const node of document.querySelectorAll("[data-operand]")) {
    delete node.dataset.operand;
    node.classList.remove(...Array.from({ length: HUES }, (_, hue) => `hue-${hue}`));
  }
  $("text").querySelector("[aria-expanded=true]")?.setAttribute("aria-expanded", "false");
  $("panel").hidden = true;
}

function toggle(button, number, answer) {
  const open = button.getAttribute("aria-expanded") === "true";
  close();
  if (open) return;
  $("hint").hidden = true; // has been understood
  button.setAttribute("aria-expanded", "true");
  $("panel").replaceChildren(...(number.steps ? explained(number) : unexplained(number, answer)));
  $("panel").hidden = false;
}

// ---------------------------------------------------------------------------------------------------
// where a number comes from

function unexplained(number, { tokens, prompt_tokens }) {
  const told = ["The model wrote this number like any word."];
  if (number.first < prompt_tokens) told[0] = "You wrote this number.";
  if (!model.dag_steps) told.push("It has no DAG.");
  else if (!model.plans) told.push("Its DAG does not plan over the numbers of the text.");
  else if (number.reason) told.push(`Nothing was planned: ${number.reason}.`);
  const expected = tokens[number.first].likeliest.slice(0, 5);
  const panel = [html("p", {}, told.join(" "))];
  if (expected.length) {
    const odds = expected.map(([text, probability]) => weighed(visible(text), probability));
    panel.push(html("h3", {}, "What the model expected first"), html("ol", { class: "plans odds" }, ...odds));
  }
  return panel;
}

const visible = (text) => text.replaceAll("\n", "\u21b5").replaceAll(" ", "\u2423");

function explained(thought) {
  const order = []; // slots, operands before what is made of them, as the expression reads
  const visit = (slot) => {
    if (order.includes(slot)) return;
    thought.steps.find((step) => step.slot === slot)?.operands.forEach(visit);
    order.push(slot);
  };
  visit(thought.result);
  const operands = thought.inputs.filter((input) => order.includes(input.slot));
  operands.sort((a, b) => a.first - b.first);
  operands.forEach((input, i) => mark(input, i % HUES));
  const plans = [thought, ...thought.alternatives];
  const panel = [html("h2", {}, pretty(thought.expression))];
  if (!thought.followed) {
    panel.push(html("p", {}, `The plan offered ${thought.written ?? "nothing"}; the text says ${thought.text}.`));
  }
  panel.push(
    html("div", { class: "graph" }, draw(thought, order, operands)),
    html("p", { class: "facts" }, `The gate was ${percent(thought.gate)} open. Written ${manner(thought.format)}.`),
    html("h3", {}, "Plans it weighed"),
    html("ol", { class: "plans" }, ...plans.map((plan) => weighed(pretty(plan.expression), plan.probability))),
  );
  return panel;
}

function mark(input, hue) {
  for (let i = input.first; i <= input.last; i++) {
    const token = document.querySelector(`[data-token="${i}"]`);
    token.dataset.operand = input.slot;
    token.classList.add(`hue-${hue}`);
  }
}

function pretty(expression) {
  return expression.replaceAll(" * ", " \u00d7 ").replaceAll(" / ", " \u00f7 ").replaceAll("-", "\u2212");
}

// A format of exact.py in words.
function manner(format) {
  const [kind, n] = format.split("_");
  const manners = { exact: "exactly", fraction: "as a fraction", places: `with ${n} decimal places` };
  return manners[kind] ?? `with ${n} significant digits`;
}

function weighed(text, probability) {
  const bar = html("div");
  bar.style.setProperty("--share", probability);
  const share = html("span", { class: "percent" }, percent(probability));
  return html("li", {}, html("span", {}, text), html("div", { class: "bar" }, bar), share);
}

// ---------------------------------------------------------------------------------------------------
// the graph: numbers of the text on top, a row a step below what it is made of

function draw(thought, order, operands) {
  const nodes = nodesOf(thought, order, operands);
  place(nodes);
  const left = Math.min(...nodes.map(({ x, width }) => x - width / 2)) - 2;
  const width = Math.max(...nodes.map(({ x, width }) => x + width / 2)) + 2 - left;
  const height = Math.max(...nodes.map(({ level }) => level)) * ROW + HEIGHT + 4;
  const size = { width, height, viewBox: `${left} -2 ${width} ${height}` };
  const edges = nodes.flatMap((node) => node.from.map((source, i) => edge(source, node, i)));
  return svg("svg", { ...size, role: "img", "aria-label": thought.expression }, ...edges, ...nodes.map(box));
}

function nodesOf(thought, order, operands) {
  const nodes = new Map();
  const add = (slot, kind, value, sign, from) => {
    const label = value === null ? "no value" : pretty(value);
    const shown = label.length > 16 ? `${label.slice(0, 7)}\u2026${label.slice(-7)}` : label;
    const level = 1 + Math.max(-1, ...from.map((node) => node.level));
    nodes.set(slot, { kind, label, shown, sign, from, level, width: Math.max(44, shown.length * DIGIT + 20) });
  };
  for (const slot of order) {
    const hue = operands.findIndex((input) => input.slot === slot);
    const step = thought.steps.find((candidate) => candidate.slot === slot);
    if (hue >= 0) add(slot, `input hue-${hue % HUES}`, operands[hue].value, null, []);
    else if (step) add(slot, "step", step.value, step.operation, step.operands.map((from) => nodes.get(from)));
  }
  const last = nodes.get(thought.result);
  if (last.kind === "step" && last.label === pretty(thought.written ?? "")) last.kind = "result";
  else add("written", "result", thought.written, "identity", [last]);
  return [...nodes.values()];
}

// Inputs beside each other as the expression reads; a step in the middle of its operands, unless one is there.
function place(nodes) {
  const last = new Map(); // node, by level
  for (const node of nodes) {
    const before = last.get(node.level);
    const middle = node.from.reduce((sum, { x }) => sum + x, 0) / node.from.length;
    const free = before ? before.x + (before.width + node.width) / 2 + GAP : -Infinity;
    node.x = node.level === 0 ? (before ? free : 0) : Math.max(middle, free);
    last.set(node.level, node);
  }
}

function edge(source, node, i) {
  const start = source.level * ROW + HEIGHT, end = node.level * ROW - 22, middle = (start + end) / 2;
  const x = node.x + (node.from.length > 1 ? 14 * i - 7 : 0);
  if (node.level > source.level + 1) {
    // straight down past the boxes of the rows between, which stand in the middle of theirs
    const turn = (node.level - 1) * ROW + HEIGHT, near = (turn + end) / 2;
    return svg("path", { d: `M${source.x} ${start} V${turn} C${source.x} ${near} ${x} ${near} ${x} ${end}` });
  }
  return svg("path", { d: `M${source.x} ${start} C${source.x} ${middle} ${x} ${middle} ${x} ${end}` });
}

function box({ kind, label, shown, sign, level, x, width }) {
  const y = level * ROW;
  const parts = [
    svg("title", {}, label),
    svg("rect", { x: x - width / 2, y, width, height: HEIGHT, rx: 8 }),
    svg("text", { class: "value", x, y: y + HEIGHT / 2 }, shown),
  ];
  if (sign) {
    const symbol = SIGNS[sign] ?? sign;
    parts.push(svg("circle", { cx: x, cy: y - 10, r: 13 }));
    parts.push(svg("text", { class: symbol.length > 1 ? "sign word" : "sign", x, y: y - 10 }, symbol));
  }
  return svg("g", { class: kind }, ...parts);
}

// ---------------------------------------------------------------------------------------------------
// the page comes to life

function describe() {
  const steps = `up to ${model.dag_steps} steps: ${model.operations.join(", ")}`;
  const facts = {
    Run: `${model.run}, step ${model.step}`,
    "Trained on": model.dataset,
    Parameters: model.parameters.toLocaleString("en"),
    Context: `${model.context} tokens`,
    DAG: model.dag_steps ? steps : "none, this is a plain GPT",
  };
  for (const [name, fact] of Object.entries(facts)) $("facts").append(html("dt", {}, name), html("dd", {}, fact));
  for (const node of document.querySelectorAll(".planning")) node.hidden = !model.plans;
  for (const node of document.querySelectorAll(".gate")) node.hidden = !model.gate;
  $("length").max = model.max_new_tokens;
  $("length").value = Math.min($("length").value, model.max_new_tokens);
  for (const example of model.examples) {
    const button = html("button", { type: "button" }, example);
    button.addEventListener("click", () => {
      $("prompt").value = example;
      run();
    });
    $("examples").append(button);
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  run();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") close();
});
model = await (await fetch("model")).json();
describe();
