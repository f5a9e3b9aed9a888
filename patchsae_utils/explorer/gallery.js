// The gallery: a file of its own, without Python.

import { LOOK, SIZE, controls, div, free, h, paint, select, shelfOf, sorted, split, titled, widget } from "./explorer.js";

/** @import { Page } from "./explorer.js" */

const unpack = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const data = JSON.parse(document.getElementById("data")?.textContent ?? "{}");

/** @param {Page} page @param {HTMLElement} root */
function galleryView(page, root) {
  const has = Object.keys(data.latents[0]?.sorts ?? {}).filter((name) => data.latents.some((entry) => entry.sorts[name] !== null));
  const sorts = has.map((name) => [name, sorted(name)]);
  const ways = "name, number or class";
  const box = h("input", { type: "search", placeholder: ways, "aria-label": `Search the latents by ${ways}`, oninput: arrange });
  const count = h("output", { "aria-live": "polite" });
  const look = controls(page);
  const list = h("ol", { class: "psx-cards" });
  const shelf = shelfOf(page, 300); // decoded when a card comes into view
  const shown = new Map();
  const cards = data.latents.map((entry) => {
    const said = (label, value) => ({ title: `${label}, ${value}`, "aria-label": `${label}, mean activation ${value}` });
    const canvases = entry.images.map(([, label, value]) => h("canvas", { role: "img", ...said(label, value) }));
    const facts = entry.facts.filter(([name]) => name !== "Label std");
    const element = h(
      "li",
      {},
      h("h3", {}, titled(entry.latent, entry.name)),
      div("psx-strip", ...canvases),
      h("p", { class: "psx-soft" }, facts.map((fact) => fact.join(" ").toLowerCase()).join(" · ")),
      h("p", { class: "psx-soft" }, `classes: ${entry.classes.join(", ") || "none"}`),
    );
    return { entry, element, canvases, text: `${entry.name} ${entry.classes.join(" ")}`.toLowerCase(), codes: split(unpack(entry.heats), page) };
  });
  async function draw(card) {
    const pictures = await shelf.decoded(card.entry.images.map(([image]) => [image, unpack(data.pictures[image])]));
    if (!shown.has(card.element)) return;
    card.canvases.forEach((canvas, i) => paint(page, canvas, SIZE.reference, pictures[i], card.codes[i], card.entry.scale));
    card.element.dataset.drawn = "true";
  }
  const watch = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const card = cards.find((one) => one.element === target);
        if (isIntersecting) shown.set(target, card);
        else if (shown.delete(target)) card.canvases.forEach(free); // two hundred latents would hold 490 MB
        if (isIntersecting) page.run(() => draw(card));
      }
    },
    { rootMargin: "300px" },
  );
  const fits = (card, word) => (/^\d+$/.test(word) ? String(card.entry.latent) === word : card.text.includes(word));
  function arrange() {
    const word = box.value.trim().toLowerCase();
    const sign = data.ascending.includes(page.get("sort")) ? 1 : -1;
    const key = (card) => card.entry.sorts[page.get("sort")] ?? sign * Infinity;
    const found = cards.filter((card) => !word || fits(card, word)).sort((a, b) => sign * (key(a) - key(b)) || 0);
    list.replaceChildren(...found.map((card) => card.element));
    count.textContent = word ? `${found.length} of ${cards.length} latents` : `${cards.length} latents`;
  }
  page.on(LOOK, () => shown.forEach((card) => page.run(() => draw(card))));
  const find = div("psx-bar", h("label", {}, "Search", box), count, select(page, "sort", "Sort by", sorts));
  root.append(div("psx-top", find, look.element), list);
  look.show(0);
  cards.forEach((card) => watch.observe(card.element));
  page.follow(["sort"], arrange);
}

// In the place of a widget's model: what is chosen stays in the page.
const state = { ...data, kind: "gallery", palette: unpack(data.palette), sort: data.order, opacity: 0.75, mode: "spotlight", contour: false };
const calls = {};
const model = {
  get: (name) => state[name],
  set(name, value) {
    state[name] = value;
    (calls[`change:${name}`] ?? []).forEach((call) => call());
  },
  save_changes() {},
  on: (name, call) => (calls[name] ??= []).push(call),
};
widget(galleryView).render({ model, el: document.getElementById("gallery") });
