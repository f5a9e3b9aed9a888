// The latent explorer.

import { bytes, controls, fill, finderOf, fit, h, legendOf, referencesOf, resize, select, titled, widget } from "./explorer.js";

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
  const scatter = h("canvas", { class: "psx-scatter", role: "img" });
  const classes = h("ol", { class: "psx-bars", "aria-label": "Classes that activate this latent most" });
  const references = referencesOf(page, "Reference images, strongest first");
  const near = h("ol", { class: "psx-near", "aria-label": "Nearest latents by decoder cosine" });
  const nearest = h("div", {}, h("h4", {}, "Nearest latents, by cosine of their decoder directions"), near);
  const neighbors = [];
  const legend = legendOf(page);
  const body = h(
    "div",
    { class: "psx-body" },
    h(
      "div",
      { class: "psx-side" },
      h("div", {}, title, keeperOf(page), facts),
      h("div", {}, h("h4", {}, "Among all latents"), scatter, h("div", { class: "psx-axis" }, h("span", {}, "rare"), h("span", {}, "→ frequency, ↑ activation"), h("span", {}, "common"))),
      h("div", {}, h("h4", {}, "Classes, share of its active tokens"), classes),
    ),
    h("div", { class: "psx-side" }, references.element, nearest),
  );
  root.append(
    h("div", { class: "psx-bar" }, finder.element, h("label", { class: "psx-grow" }, "Latent", slider), place, sort),
    h("div", { class: "psx-bar" }, ...controls(page), legend.element),
    body,
  );

  let order = new Uint32Array();
  let card = null;
  let asked = null; // the latent whose card was drawn last, or is being drawn
  let idle = 0;
  const known = new Map(); // the last cards that came

  function readOrder() {
    order = new Uint32Array(bytes(page.get("order")).slice().buffer);
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
    scatter.setAttribute("aria-label", `Each latent by frequency and mean activation; the chosen one is marked. ${next.facts.map((f) => f.join(" ")).join(", ")}`);
    const most = next.classes[0]?.[1] ?? 1;
    classes.replaceChildren(
      ...next.classes.map(([name, share]) => h("li", {}, h("b", { title: name }, name), fill(share / most), h("i", {}, `${Math.round(100 * share)} %`))),
    );
    showNear(next.neighbors);
    legend.show(next.scale);
    showSelection();
    clearTimeout(idle);
    idle = setTimeout(prefetch, 200);
  }
  function showNear(latents) {
    nearest.hidden = !latents.length;
    resize(near, neighbors, latents.length, () => {
      const row = { number: h("b"), name: h("span"), value: h("i") };
      row.button = h("button", { class: "psx-chip", type: "button", onclick: () => page.set("latent", row.latent) }, row.number, row.name, row.value);
      row.element = h("li", {}, row.button);
      return row;
    });
    neighbors.forEach((row, i) => {
      const [latent, name, cosine] = latents[i];
      Object.assign(row, { latent });
      row.number.textContent = latent;
      row.name.textContent = name;
      row.value.textContent = cosine.toFixed(2);
      row.button.setAttribute("aria-label", `Latent ${latent}${name ? `, ${name}` : ""}, cosine ${cosine.toFixed(2)}`);
    });
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
  };
}

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

// A point a latent, from two bytes each (0 0: dead). Mid-grey shows on light and dark pages alike.
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
  let best = -1;
  let least = Infinity;
  for (let i = 0; i < points.length / 2; i++) {
    if (!points[2 * i]) continue;
    const distance = ((points[2 * i] - x) * box.width) ** 2 + ((points[2 * i + 1] - y) * box.height) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}
