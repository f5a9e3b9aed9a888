// The gallery: a file of its own, without Python.

import { LOOK, SIZE, controls, h, legendOf, lookOf, paint, pictureOf, select, titled } from "./explorer.js";

const unpack = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

function galleryOf(data, root) {
  const state = { tau: data.tau, opacity: 0.75, mode: "spotlight", contour: false, grid: data.grid, palette: unpack(data.palette), image: -1, sort: data.order };
  const calls = {};
  const page = {
    get: (name) => state[name],
    set(name, value) {
      state[name] = value;
      (calls[name] ?? []).forEach((call) => call());
    },
    on: (names, call) => names.forEach((name) => (calls[name] ??= []).push(call)),
  };
  const words = { frequency: "frequency", mean_activation: "mean activation", label_entropy: "label entropy", score: "score of its name" };
  const has = Object.entries(words).filter(([name]) => data.latents.some((entry) => entry.sorts[name] !== null));
  const box = h("input", { type: "search", placeholder: "name, number or class", "aria-label": "Search the latents by name, number or class" });
  const count = h("output", { "aria-live": "polite" });
  const legend = legendOf(page);
  const list = h("ol", { class: "psx-cards" });
  const pictures = new Map(); // decoded once, and only when a card comes into view
  const shown = new Map();

  function decoded(image) {
    if (!pictures.has(image)) {
      const blob = new Blob([unpack(data.pictures[image])], { type: "image/jpeg" });
      pictures.set(image, createImageBitmap(blob).then(pictureOf));
    }
    return pictures.get(image);
  }
  const cards = data.latents.map((entry) => {
    const canvases = entry.images.map(([image, label, value]) => h("canvas", { role: "img", title: `${label}, ${value}`, "aria-label": `${label}, mean activation ${value}` }));
    const facts = entry.facts.filter(([name]) => name !== "Label std");
    const element = h("li", {},
      h("h3", {}, titled(entry.latent, entry.name)),
      h("div", { class: "psx-strip" }, ...canvases),
      h("p", { class: "psx-soft" }, facts.map((fact) => fact.join(" ").toLowerCase()).join(" · ")),
      h("p", { class: "psx-soft" }, `classes: ${entry.classes.join(", ") || "none"}`),
    );
    const text = `${entry.name} ${entry.classes.join(" ")}`.toLowerCase();
    return { entry, element, canvases, text, codes: unpack(entry.heats) };
  });
  async function draw(card) {
    const size = data.grid[0] * data.grid[1];
    const all = await Promise.all(card.entry.images.map(([image]) => decoded(image)));
    card.canvases.forEach((canvas, i) => paint(canvas, SIZE.reference, all[i], card.codes.subarray(i * size, (i + 1) * size), lookOf(page, card.entry.scale)));
    card.element.dataset.drawn = "true";
  }
  const watch = new IntersectionObserver(
    (entries) =>
      entries.forEach(({ target, isIntersecting }) => {
        const card = cards.find((one) => one.element === target);
        if (isIntersecting) shown.set(target, card), draw(card).catch(console.error);
        else if (shown.delete(target)) card.canvases.forEach((canvas) => (canvas.width = canvas.height = 0)); // two hundred latents would hold 490 MB
      }),
    { rootMargin: "300px" },
  );
  const fits = (card, word) => (/^\d+$/.test(word) ? String(card.entry.latent) === word : card.text.includes(word));
  function arrange() {
    const word = box.value.trim().toLowerCase();
    const sign = data.ascending.includes(state.sort) ? 1 : -1;
    const key = (card) => card.entry.sorts[state.sort] ?? sign * Infinity;
    const found = cards.filter((card) => !word || fits(card, word)).sort((a, b) => sign * (key(a) - key(b)) || 0);
    list.replaceChildren(...found.map((card) => card.element));
    count.textContent = word ? `${found.length} of ${cards.length} latents` : `${cards.length} latents`;
  }
  box.addEventListener("input", arrange);
  page.on(["sort"], arrange);
  page.on(LOOK, () => shown.forEach((card) => draw(card).catch(console.error)));
  root.append(
    h("section", { class: "psx psx-gallery" }, h("div", { class: "psx-bar psx-top" }, h("label", {}, "Search", box), count, select(page, "sort", "Sort by", Object.fromEntries(has)), ...controls(page), legend.element), list),
  );
  legend.relative();
  cards.forEach((card) => watch.observe(card.element));
  arrange();
}

galleryOf(JSON.parse(document.getElementById("data").textContent), document.getElementById("gallery"));
