// The steering panel.

// prettier-ignore
import {
  act, bytes, controls, copier, div, finderOf, h, imageSteps, listOf, options, referencesOf, rowsIn, select, short, shownOf, signed, stageOf,
  titled, uploadOf, widget,
} from "./explorer.js";

export default widget(steeringView);

const WHERE = { all: "all tokens", cls: "CLS only", patches: "all patches", selected: "selected patches" };
const BATCH = { "": "on this image alone", class: "on others of its class, too", any: "on others of any class, too" };
const HINT = "Click or drag over patches to select them; or arrow keys, and Space. Escape clears the selection.";

/** @import { Page } from "./explorer.js" */

/** @param {Page} page @param {HTMLElement} root */
function steeringView(page, root) {
  const finder = finderOf(page, (latent) => page.get("latents").includes(latent) || page.set("latents", [...page.get("latents"), latent]));
  const here = act("Add the patches' latent", () => page.send({ kind: "add_here" }), { title: "The latent that is strongest on the selected patches" });
  const reset = act("Reset", () => page.set({ edits: [], patches: [], where: page.get("where") === "selected" ? "all" : page.get("where") }));
  const odds = listOf(page, "Class probabilities", { look: "psx-odds", marks: ["psx-before", "psx-after"] });
  const said = h("p", { class: "psx-hidden", "aria-live": "polite" });
  const code = h("code", { tabindex: 0, role: "textbox", "aria-readonly": "true", "aria-label": "This edit as a line of Python" });
  const copy = copier(page, "Copy", () => code.textContent);
  const look = controls(page);
  const stage = stageOf(page, { several: true, hint: HINT, choose, heat: () => [card.latent < 0 ? null : bytes(card.heat), card.scale] });
  const seen = h("p", { class: "psx-status" });
  const sliders = slidersOf(page, () => card.latent);
  const key = h("p", { class: "psx-key" }, h("span", { class: "psx-before" }, "before"), h("span", { class: "psx-after" }, "after"));
  const ask = () => page.send({ kind: "batch", of: batch.value });
  const batch = h("select", { "aria-label": "Images that the edits act on", onchange: ask }, ...options(BATCH));
  const others = referencesOf(page, "The same edits on other images", "probability of its class");
  const body = div(
    "psx-body",
    div("", stage.element, seen),
    div(
      "psx-side",
      div("", h("h4", {}, "Latents: 1 leaves them as they are, 0 turns them off"), sliders.element, div("psx-bar", finder, here)),
      div("", odds.element, key, said),
      others.element,
      div("", h("h4", {}, "The same in Python"), div("psx-code", code, copy)),
    ),
  );
  root.append(div("psx-bar", ...imageSteps(page), ...uploadOf(page, root), select(page, "where", "Edit", WHERE), batch, reset), look.element, body);
  let card = null;
  const percent = (share) => `${(100 * share).toFixed(share > 0.0995 || share === 0 ? 0 : 1)} %`;
  const points = (change) => (Math.abs(change) < 0.0005 ? "" : ` (${signed(100 * change)})`);

  // A selection is made to be edited: the first one turns the edits to it.
  function choose(patches) {
    const turns = patches.length && !page.get("patches").length && page.get("where") !== "selected";
    page.set(turns ? { patches, where: "selected" } : { patches });
  }
  page.on(["image"], () => page.busy(body, card?.image !== page.get("image")));
  page.follow(["shown"], async () => {
    const next = page.get("shown");
    if (!(await stage.show(next, shownOf(next)))) return; // overtaken by a later card
    card = next;
    stage.label(`${shownOf(next)}. ${next.patches.length} patches selected.`);
    page.busy(body, card.image !== page.get("image"));
    look.show(next.scale);
    code.textContent = next.code;
    const active = bytes(next.heat).some((one) => one > 0);
    const what = titled(next.latent, next.name);
    const where = active
      ? `: where it is active${next.edited ? ", as edited" : ""}`
      : ` is active on no patch of this image${next.edited ? " as edited" : ""}.`;
    seen.textContent = next.latent < 0 ? "Choose a latent by its number to see where it is active." : what + where;
    sliders.show(next.sliders);
    const text = (before, after) => `${percent(before)} → ${percent(after)}${points(after - before)}`;
    const bars = next.bars.map(([name, ...both]) => ({ name, values: both, text: text(...both) }));
    odds.show(bars, { scale: 1 });
    const edited = next.sliders.some((slider) => slider.edited);
    const spoken = bars.slice(0, edited ? 2 : 0).map((bar) => `${bar.name} ${bar.text}`);
    said.textContent = spoken.join(". ");
    stage.draw();
  });
  page.follow(["others"], async () => {
    const next = page.get("others");
    others.element.hidden = !next.images;
    if (next.images) await others.show(next);
  });
}

/** A slider for each latent that is edited. @param {Page} page @param {() => number} seen the latent that is shown */
function slidersOf(page, seen) {
  const element = h("ol", { class: "psx-sliders", "aria-label": "Latents" });
  function change(row, op, value) {
    const others = page.get("edits").filter((edit) => edit.latent !== row.latent);
    set(row, op, value, row.limit);
    page.set("edits", op === "scale" && value === 1 ? others : [...others, { latent: row.latent, op, value }]);
  }
  function set(row, op, value, limit) {
    row.limit = limit;
    row.op.value = op;
    const [min, max, step] = op === "scale" ? [0, 4, 0.1] : [-limit, 4 * limit, limit / 20];
    Object.assign(row.range, { min, max, step });
    row.range.value = value;
    row.value.textContent = op === "scale" ? `×${value.toFixed(1)}` : signed(value);
    row.range.setAttribute("aria-valuetext", op === "scale" ? `times ${value.toFixed(1)}` : `plus ${value.toPrecision(2)}`);
  }
  const make = () => {
    const row = { number: h("b"), name: h("span"), value: h("output") };
    const pick = () => page.set("latent", page.get("latent") === row.latent ? -1 : row.latent);
    row.pick = h("button", { class: "psx-pick", type: "button", onclick: pick }, row.number, row.name);
    row.op = h("select", { onchange: () => change(row, row.op.value, row.op.value === "scale" ? 1 : 0) }, ...options({ scale: "×", add: "+" }));
    row.range = h("input", { type: "range", oninput: () => change(row, row.op.value, Number(row.range.value)) });
    row.off = act("off", () => change(row, "scale", 0));
    const others = () => page.get("latents").filter((latent) => latent !== row.latent);
    row.remove = act("✕", () => page.set("latents", others()));
    row.element = h("li", {}, row.pick, row.op, row.range, row.value, row.off, row.remove);
    return row;
  };
  const show = rowsIn(element, make, (row, slider) => {
    const what = `latent ${slider.latent}${slider.name ? `, ${slider.name}` : ""}`;
    row.latent = row.number.textContent = slider.latent;
    row.name.textContent = slider.name || `patches ${short(slider.most)}, CLS ${short(slider.cls)}`;
    row.pick.title = `Show where ${what} is active: in this image at most ${short(slider.most)} on a patch, ${short(slider.cls)} at CLS`;
    row.pick.setAttribute("aria-pressed", String(seen() === slider.latent));
    const labels = { op: `Multiply or add: ${what}`, off: `Turn off ${what}`, remove: `Remove the slider of ${what}`, range: `Strength of ${what}` };
    for (const [name, label] of Object.entries(labels)) row[name].setAttribute("aria-label", label);
    row.element.classList.toggle("psx-edited", slider.edited);
    // A hand on the slider is ahead of the card that comes back.
    const pending = page.get("edits").find((edit) => edit.latent === slider.latent);
    set(row, pending?.op ?? "scale", pending?.value ?? 1, slider.limit);
  });
  return { element, show };
}
