// The latent explorer.

import { ARROWS, barsOf, bytes, chipsOf, controls, finderOf, fit, h, legendOf, referencesOf, rowsIn, select, short, titled, widget, words } from "./explorer.js";

export default widget(latentView);

const SORTS = {
  frequency: "frequency", mean_activation: "mean activation", label_entropy: "label entropy", monosemanticity: "monosemanticity", score: "score of its name",
};

function latentView(page, root) {
  const sort = select(page, "sort", "Sort by", Object.fromEntries(page.get("sorts").map((name) => [name, SORTS[name] ?? name])));
  const slider = h("input", { type: "range", min: 0, step: 1, "aria-label": "Latent, in the chosen order" });
  const finder = finderOf(page);
  const place = h("output", { class: "psx-soft" });
  const title = h("h3", { "aria-live": "polite" });
  const facts = h("dl", { class: "psx-facts" });
  const scatter = h("canvas", { class: "psx-scatter", role: "application", tabindex: 0, "aria-roledescription": "scatter of latents" });
  const classes = h("ol", { class: "psx-odds psx-bars", "aria-label": "Classes that activate this latent most" });
  const showClasses = barsOf(classes, [""], (share) => `${Math.round(100 * share)} %`);
  const references = referencesOf(page, "Reference images, strongest first");
  const near = chipsOf(page, "Nearest latents, by cosine of their decoder directions", "cosine");
  const effect = effectOf(page);
  const legend = legendOf(page);
  const body = h("div", { class: "psx-body" },
    h("div", { class: "psx-side" },
      h("div", {}, title, keeperOf(page), facts),
      h("div", {}, h("h4", {}, "Among all latents"), scatter, h("div", { class: "psx-axis" }, h("span", {}, "rare"), h("span", {}, "→ frequency, ↑ activation"), h("span", {}, "common"))),
      h("div", {}, h("h4", {}, "Classes, share of its active tokens"), classes),
    ),
    h("div", { class: "psx-side" }, references.element, near.element, effect.element),
  );
  root.append(
    h("div", { class: "psx-bar" }, finder.element, h("label", { class: "psx-grow" }, "Latent", slider), place, sort),
    h("div", { class: "psx-bar" }, ...controls(page), legend.element),
    body,
  );

  let [order, card, idle] = [new Uint32Array(), null, 0];
  let asked = null; // the latent whose card was drawn last, or is being drawn
  const known = new Map(); // the last cards that came

  function readOrder() {
    order = words(page.get("order"), Uint32Array);
    slider.max = Math.max(0, order.length - 1);
    showSelection();
  }
  function showSelection() {
    const latent = page.get("latent");
    const rank = order.indexOf(latent);
    if (rank >= 0) slider.value = rank;
    place.textContent = rank < 0 ? "" : `${rank + 1} of ${order.length}`;
    slider.setAttribute("aria-valuetext", rank < 0 ? "none" : `latent ${latent}, ${rank + 1} of ${order.length} by ${SORTS[page.get("sort")] ?? page.get("sort")}`);
    body.classList.toggle("psx-busy", (card?.latent ?? -1) !== latent);
    drawScatter(scatter, bytes(page.get("points")), latent);
  }
  async function showCard(next) {
    if (asked === page.get("latent")) return; // an answer to an earlier step, or to one that needed none
    asked = next.latent;
    if (!(await references.show(next))) return; // overtaken by a later card
    card = next;
    title.textContent = titled(next.latent, next.name);
    facts.replaceChildren(...next.facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    scatter.setAttribute("aria-label", `Each latent by frequency and mean activation; the chosen one is marked, arrow keys move it. ${next.facts.map((f) => f.join(" ")).join(", ")}`);
    showClasses(next.classes, next.classes[0]?.[1]);
    near.show(next.neighbors);
    legend.show(next.scale);
    showSelection();
    clearTimeout(idle);
    idle = setTimeout(prefetch, 200);
    effect.ask();
  }
  // While nothing happens Python sends what a next step would show, so that the step needs no answer.
  function prefetch() {
    const rank = order.indexOf(page.get("latent"));
    if (rank >= 0) page.send({ kind: "prefetch", latents: [1, -1, 2].map((step) => order[rank + step]).filter((latent) => latent !== undefined) });
  }

  slider.addEventListener("input", () => order.length && page.set("latent", order[Number(slider.value)]));
  scatter.addEventListener("click", (event) => {
    const latent = nearestPoint(scatter, bytes(page.get("points")), event);
    if (latent >= 0) page.set("latent", latent);
  });
  scatter.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    const latent = pointBeside(bytes(page.get("points")), page.get("latent"), step);
    if (latent >= 0) page.set("latent", latent);
  });
  page.on(["order"], readOrder);
  page.on(["names"], () => (title.textContent = titled(page.get("latent"), finder.nameOf(page.get("latent")))));
  page.on(["latent"], () => {
    showSelection();
    const early = known.get(page.get("latent"));
    return early && showCard(early);
  });
  page.on(["ahead"], () => {
    const next = page.get("ahead");
    known.delete(next.latent);
    known.set(next.latent, next);
    if (known.size > 12) known.delete(known.keys().next().value);
    references.expect(next);
  });
  page.on(["shown"], () => showCard(page.get("shown")));
  const watch = new ResizeObserver(() => drawScatter(scatter, bytes(page.get("points")), page.get("latent")));
  watch.observe(scatter);
  readOrder();
  page.run(() => showCard(page.get("shown")));
  return () => {
    watch.disconnect();
    clearTimeout(idle);
    references.close();
    effect.close();
  };
}

// What the latent does, beyond its strongest images: asked for while it is open, once the latent rests.
function effectOf(page) {
  const histogram = h("div", { class: "psx-hist", role: "img", "aria-label": "Histogram of its activations" });
  const ends = [h("span"), h("span", {}, "activation on a token, doubling every second bar"), h("span")];
  const examples = referencesOf(page, "Images where it is middling, then weak");
  const pushes = h("ol", { class: "psx-odds psx-pushes", "aria-label": "Classes whose logit it raises or lowers" });
  const showPushes = barsOf(pushes, [""], (value, low, high) => `${signed(value)} [${signed(low)}, ${signed(high)}]`);
  const together = chipsOf(page, "Active in the same images, by correlation", "correlation");
  const status = h("p", { class: "psx-status" });
  const pushed = h("div", {}, h("h4", {}, "Classes it pushes up and down: logit lost without it, mean over its reference images"), pushes);
  const places = Object.fromEntries(page.get("places").map((name) => [name, referencesOf(page, `Elsewhere: ${name}`)]));
  const elsewhere = Object.values(places).map((place) => place.element);
  const content = h("div", { class: "psx-side" }, h("div", {}, h("h4", {}, "How strongly it is active"), histogram, h("div", { class: "psx-axis" }, ...ends)), examples.element, pushed, together.element, ...elsewhere);
  const element = h("details", { class: "psx-does" }, h("summary", {}, "What does it do?"), status, content);
  const showBins = rowsIn(histogram, () => ({ element: h("div") }), (row, [share, title]) => (row.element.style.setProperty("--share", share), (row.element.title = title)));
  let later = 0;
  content.hidden = true;
  const ask = () => {
    clearTimeout(later);
    if (!element.open || page.get("latent") < 0 || page.get("effect").latent === page.get("latent")) return;
    status.textContent = content.hidden ? "Reading a sample of the images: some seconds, once." : "";
    content.classList.add("psx-busy");
    later = setTimeout(() => page.send({ kind: "does", latent: page.get("latent") }), 250);
  };
  async function show() {
    const next = page.get("effect");
    if (next.latent === undefined) return;
    const total = next.counts.reduce((sum, count) => sum + count, 0);
    const most = Math.max(...next.counts, 1);
    showBins(next.counts.map((count, i) => [count / most, `${short(next.edges[i])} to ${short(next.edges[i + 1])}: ${count} tokens`]));
    [ends[0].textContent, ends[2].textContent] = [short(next.edges[0]), short(next.edges.at(-1))];
    histogram.setAttribute("aria-label", `Histogram of ${total} active tokens by activation`);
    showPushes(next.pushes, Math.max(...next.pushes.map((row) => Math.abs(row[1])), 1e-9));
    pushed.hidden = !next.pushes.length;
    together.show(next.together);
    content.hidden = false;
    status.textContent = "";
    content.classList.toggle("psx-busy", next.latent !== page.get("latent"));
    elsewhere.forEach((place) => place.classList.add("psx-busy"));
    await examples.show(next);
    askNext(-1);
  }
  // One place after the other, so that what is clicked meanwhile is answered in between.
  function askNext(done) {
    const place = page.get("places")[done + 1];
    if (place !== undefined && element.open && page.get("effect").latent === page.get("latent")) page.send({ kind: "elsewhere", latent: page.get("latent"), place });
  }
  async function showPlace() {
    const next = page.get("place");
    if (next.latent !== page.get("latent")) return;
    places[next.place].element.classList.remove("psx-busy");
    await places[next.place].show(next);
    askNext(page.get("places").indexOf(next.place));
  }
  element.addEventListener("toggle", ask);
  page.on(["effect"], show);
  page.on(["place"], showPlace);
  page.on(["notice"], () => page.get("notice") && (status.textContent = "")); // it failed, and the page says why
  page.run(show);
  return { element, ask, close: () => (clearTimeout(later), [examples, ...Object.values(places)].forEach((one) => one.close())) };
}

const signed = (value) => `${value < 0 ? "−" : "+"}${short(Math.abs(value))}`;

// One's own words on a latent: Python keeps them in a file.
function keeperOf(page) {
  let held = -1; // the latent whose words are being written
  const send = (latent, words) => latent >= 0 && page.send({ kind: "keep", latent, ...words });
  const mine = () => page.get("kept")[page.get("latent")] ?? {};
  const star = h("button", { class: "psx-step", type: "button", "aria-label": "Star this latent", title: "Search for * to find the starred ones", onclick: () => send(page.get("latent"), { star: !mine().star }) });
  const fields = { name: h("input", { type: "text", placeholder: "your name for it", "aria-label": "Your name for this latent", maxlength: 80 }), note: h("textarea", { rows: 1, placeholder: "note", "aria-label": "Note on this latent", maxlength: 2000 }) };
  const show = () => {
    star.textContent = mine().star ? "★" : "☆";
    star.setAttribute("aria-pressed", Boolean(mine().star));
    for (const [name, field] of Object.entries(fields)) if (document.activeElement !== field) field.value = mine()[name] ?? "";
  };
  for (const [name, field] of Object.entries(fields)) {
    field.addEventListener("focus", () => (held = page.get("latent")));
    field.addEventListener("change", () => send(held, { [name]: field.value }));
    field.addEventListener("blur", show);
  }
  page.on(["kept", "latent"], show);
  show();
  return h("div", { class: "psx-keep" }, star, fields.name, fields.note);
}

// A point a latent, from two bytes each (0 0: dead). Mid-gray shows on light and dark pages alike.
function drawScatter(canvas, points, chosen) {
  const { width, height } = fit(canvas);
  const context = canvas.getContext("2d");
  const at = (i) => [6 + ((points[2 * i] - 1) / 254) * (width - 12), height - 6 - ((points[2 * i + 1] - 1) / 254) * (height - 12)];
  if (!canvas.width || !canvas.height) return; // not laid out yet
  context.drawImage(cloudOf(canvas, points, at), 0, 0, width, height);
  if (chosen >= 0 && points[2 * chosen]) {
    const [x, y] = at(chosen);
    context.beginPath();
    context.arc(x, y, 5, 0, 2 * Math.PI);
    context.fillStyle = "#e69f00";
    context.fill();
    context.strokeStyle = "#1a1a1a";
    context.lineWidth = 1.5;
    context.stroke();
  }
}

// All points, drawn once for each size: there may be fifty thousand.
function cloudOf(canvas, points, at) {
  const drawn = canvas.cloud;
  if (drawn?.points.buffer === points.buffer && drawn.layer.width === canvas.width && drawn.layer.height === canvas.height) return drawn.layer;
  const layer = h("canvas", { width: canvas.width, height: canvas.height });
  const context = layer.getContext("2d");
  context.setTransform(canvas.getContext("2d").getTransform());
  context.fillStyle = "rgba(128, 128, 128, 0.35)";
  for (let i = 0; i < points.length / 2; i++) {
    if (!points[2 * i]) continue;
    const [x, y] = at(i);
    context.fillRect(x - 1, y - 1, 2, 2);
  }
  canvas.cloud = { points, layer };
  return layer;
}

function nearestPoint(canvas, points, event) {
  const box = canvas.getBoundingClientRect();
  const x = 1 + (254 * (event.clientX - box.left - 6)) / (box.width - 12);
  const y = 1 + (254 * (box.bottom - 6 - event.clientY)) / (box.height - 12);
  let [best, least] = [-1, Infinity];
  for (let i = 0; i < points.length / 2; i++) {
    if (!points[2 * i]) continue;
    const distance = ((points[2 * i] - x) * box.width) ** 2 + ((points[2 * i + 1] - y) * box.height) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

// The nearest point in the direction of an arrow key: what lies off it counts twice.
function pointBeside(points, from, [down, right]) {
  let [best, least] = [-1, Infinity];
  for (let i = 0; from >= 0 && i < points.length / 2; i++) {
    const [x, y] = [points[2 * i] - points[2 * from], points[2 * i + 1] - points[2 * from + 1]];
    const [ahead, off] = right ? [x * right, y] : [-y * down, x];
    if (points[2 * i] && ahead > 0 && ahead + 2 * Math.abs(off) < least) [best, least] = [i, ahead + 2 * Math.abs(off)];
  }
  return best;
}
