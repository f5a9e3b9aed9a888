// The patch explorer.

import { ARROWS, LOOK, SIZE, border, bytes, controls, decoding, h, imageSteps, legendOf, listOf, lookOf, namesOf, outline, paint, patchAt, placeOf, referencesOf, select, shownOf, stepped, three, titled, uploadOf, widget, words } from "./explorer.js";

export default widget(patchView);

const RANKS = { activation: "activation", distinctive: "distinctiveness", contrast: "here, not elsewhere", prediction: "what a class owes" };

function patchView(page, root) {
  const [rows, columns] = page.get("grid");
  const steps = imageSteps(page);
  const rank = select(page, "rank", "List by", page.get("ranks").map((name) => [name, RANKS[name]]));
  const target = select(page, "target", "Class", [[-1, "the predicted one"], ...page.get("classes").map((name, i) => [i, name])]);
  const stage = h("canvas", { class: "psx-stage", tabindex: 0, role: "application", "aria-roledescription": "grid of patches" });
  const title = h("h3");
  const hint = h("p", { class: "psx-status" }, "Point at a patch to see its latents, click to choose it; Shift and click, or Shift and arrow keys, choose several. Escape takes the choice back.");
  const live = h("p", { class: "psx-hidden", "aria-live": "polite" });
  const chosen = h("h3");
  const most = h("p", { class: "psx-soft" });
  const references = referencesOf(page, "Its strongest images in the data set");
  const here = listOf(page, "Chosen patch");
  const whole = listOf(page, "Whole image");
  const legend = legendOf(page);
  const side = h("div", { class: "psx-side" }, h("div", { class: "psx-lists" }, here.element, whole.element), h("div", {}, chosen, most), references.element);
  const body = h("div", { class: "psx-body" }, h("div", {}, title, stage, hint, live), side);
  root.append(h("div", { class: "psx-bar" }, ...steps.elements, ...uploadOf(page, root), rank, target), h("div", { class: "psx-bar" }, ...controls(page), legend.element), body);

  const names = namesOf(page);
  let [card, picture] = [null, null];
  let [hovered, cursor] = [-1, -1]; // patches: under the pointer, and that which keys move
  const decoder = decoding();

  async function showCard() {
    const next = page.get("shown");
    const opened = await decoder(next.jpeg);
    if (!opened) return; // overtaken by a later card
    [card, picture] = [next, opened];
    title.textContent = shownOf(next);
    const spot = next.patches.length > 1 ? `${next.patches.length} patches chosen` : next.patch < 0 ? "" : placeOf(next.patch, columns);
    const top = next.patch_latents[0];
    live.textContent = spot && `${spot}. ${top ? `Strongest: latent ${top.latent}${top.name ? `, ${top.name}` : ""}` : "No latent is active here"}.`;
    stage.setAttribute("aria-label", `${shownOf(next)}. ${spot || "No patch chosen"}. Arrow keys move over ${rows} by ${columns} patches.`);
    showSelection();
  }
  async function showReferences() {
    const next = page.get("found");
    if (await references.show(next)) references.element.hidden = !next.images.length;
  }
  // The heat map of the chosen latent: with a listed latent it is here already, before Python has answered.
  function heatNow() {
    const latent = page.get("latent");
    if (latent < 0 || card.latent === latent) return { codes: latent < 0 ? null : bytes(card.heat), scale: card.scale };
    const place = card.listed.indexOf(latent);
    if (place < 0) return { codes: null, scale: 1 };
    const size = rows * columns;
    return { codes: bytes(card.listed_heats).subarray(place * size, (place + 1) * size), scale: card.listed_scales[place] };
  }
  // A patch's latents, of which Python sent the strongest when the image came.
  function topsOf(patch) {
    const { latents, values, n } = page.get("tops");
    const [which, value] = [words(latents, Uint32Array), words(values, Float32Array)];
    return Array.from({ length: n }, (_, i) => ({ latent: which[patch * n + i], value: value[patch * n + i] }))
      .filter((entry) => entry.value > 0 || (entry.value < 0 && page.get("rank") === "prediction"))
      .map((entry) => ({ ...entry, name: names.get(entry.latent) ?? "", text: page.get("rank") === "prediction" ? `${entry.value > 0 ? "+" : ""}${entry.value.toPrecision(2)}` : three(entry.value) }));
  }
  function showLists() {
    const chosen = page.get("patches");
    const contrast = page.get("rank") === "contrast"; // the rest of the image is Python's to compare with
    const [heading, latents] =
      hovered >= 0 && !chosen.includes(hovered) ? ["Patch under the pointer", topsOf(hovered)]
      : chosen.length > 1 ? [`${chosen.length} chosen patches, mean`, card.patch_latents]
      : chosen.length ? ["Chosen patch", contrast ? card.patch_latents : topsOf(chosen[0])]
      : ["Chosen patch", []];
    here.element.classList.toggle("psx-busy", latents === card.patch_latents && card.patches.length !== chosen.length); // of other patches still
    here.show(latents, chosen.length || hovered >= 0 ? "No latent is active here." : "None yet: point at the image.", heading);
  }
  function showSelection() {
    if (!card) return;
    const latent = page.get("latent");
    steps.show(page.get("image"));
    target.hidden = page.get("rank") !== "prediction";
    body.classList.toggle("psx-busy", card.image !== page.get("image") || card.uploaded !== page.get("uploaded"));
    chosen.textContent = latent < 0 ? "" : titled(latent, names.get(latent));
    const ready = card.latent === latent;
    most.textContent = latent < 0 ? "Choose a latent to see where it is." : ready ? `In this image: at most ${card.most} on a patch, ${card.cls} at CLS.` : "\u00a0";
    whole.show(card.image_latents, "No latent is active.", card.said || "Whole image");
    showLists();
    draw();
  }
  function draw() {
    if (!card) return;
    const { codes, scale } = heatNow();
    legend.show(scale);
    paint(stage, SIZE.stage, picture, codes, lookOf(page, scale));
    const context = stage.getContext("2d");
    const chosen = new Set(page.get("patches"));
    const side = [stage.width / columns, stage.height / rows];
    if (hovered >= 0 && !chosen.has(hovered)) outline(context, hovered, side, columns, 1);
    border(context, (patch) => chosen.has(patch), [rows, columns], 3);
  }
  function choose(patch, several) {
    cursor = patch;
    if (!several) return page.set({ patch, patches: patch < 0 ? [] : [patch] });
    const chosen = new Set(page.get("patches"));
    const added = !chosen.delete(patch);
    if (added) chosen.add(patch);
    page.set({ patch: added ? patch : [...chosen].at(-1) ?? -1, patches: [...chosen].sort((a, b) => a - b) });
  }
  const many = (event) => event.shiftKey || event.ctrlKey || event.metaKey;
  const point = (patch) => {
    if (patch === hovered) return;
    hovered = patch;
    if (card) showLists();
    draw();
  };
  stage.addEventListener("click", (event) => choose(patchAt(event, stage, [rows, columns]), many(event)));
  stage.addEventListener("pointermove", (event) => point(patchAt(event, stage, [rows, columns])));
  stage.addEventListener("pointerleave", () => point(-1));
  stage.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step && event.key !== "Escape") return;
    event.preventDefault();
    if (!step) return choose(-1, false);
    const from = page.get("patch") < 0 ? -1 : cursor < 0 ? page.get("patch") : cursor;
    if (from < 0) return choose(Math.floor(rows / 2) * columns + Math.floor(columns / 2), false);
    const next = (cursor = stepped(from, step, [rows, columns]));
    if (!event.shiftKey) choose(next, false);
    else page.set({ patch: next, patches: [...new Set([...page.get("patches"), next])].sort((a, b) => a - b) });
  });

  page.on(["shown"], showCard);
  page.on(["found"], showReferences);
  page.on(["tops", "image", "uploaded", "patches", "latent", "rank"], showSelection);
  page.on(LOOK, draw);
  page.run(showCard);
  page.run(showReferences);
  return () => (decoder.close(), references.close());
}
