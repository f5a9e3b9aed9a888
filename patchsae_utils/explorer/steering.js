// The steering panel.

import { ARROWS, LOOK, SIZE, barsOf, border, bytes, controls, copier, decoding, finderOf, h, imageSteps, legendOf, lookOf, outline, paint, patchAt, placeOf, referencesOf, rowsIn, select, short, shownOf, stepped, titled, uploadOf, widget } from "./explorer.js";

export default widget(steeringView);

function steeringView(page, root) {
  const [rows, columns] = page.get("grid");
  const steps = imageSteps(page);
  const where = select(page, "where", "Edit", { all: "all tokens", cls: "CLS only", patches: "all patches", selected: "selected patches" });
  const stage = h("canvas", { class: "psx-stage", tabindex: 0, role: "application", "aria-roledescription": "grid of patches" });
  const title = h("h3");
  const hint = h("p", { class: "psx-status" }, "Click or drag over patches to select them; or arrow keys, and Space. Escape clears the selection.");
  const seen = h("p", { class: "psx-status" });
  const live = h("p", { class: "psx-hidden", "aria-live": "polite" });
  const said = h("p", { class: "psx-hidden", "aria-live": "polite" });
  const sliders = h("ol", { class: "psx-sliders", "aria-label": "Latents" });
  const finder = finderOf(page, (latent) => page.get("latents").includes(latent) || page.set("latents", [...page.get("latents"), latent]));
  const add = h("button", { class: "psx-step", type: "button", title: "The latent that is strongest on the selected patches", onclick: () => page.send({ kind: "add_here" }) }, "Add the patches' latent");
  const reset = h("button", { class: "psx-step", type: "button", onclick: () => page.set({ edits: [], patches: [], where: page.get("where") === "selected" ? "all" : page.get("where") }) }, "Reset");
  const bars = h("ol", { class: "psx-odds", "aria-label": "Class probabilities before and after" });
  const code = h("code", { tabindex: 0, "aria-label": "This edit as a line of Python" });
  const copy = copier(page, "Copy", () => code.textContent);
  const legend = legendOf(page);
  const more = [["", "on this image alone"], ["class", "on others of its class, too"], ["any", "on others of any class, too"]].map(([value, text]) => h("option", { value }, text));
  const batch = h("select", { "aria-label": "Images that the edits act on", onchange: () => page.send({ kind: "batch", of: batch.value }) }, ...more);
  const others = referencesOf(page, "The same edits on other images", "probability of its class");
  root.append(
    h("div", { class: "psx-bar" }, ...steps.elements, ...uploadOf(page, root), where, batch, reset),
    h("div", { class: "psx-bar" }, ...controls(page), legend.element),
    h("div", { class: "psx-body" },
      h("div", {}, title, stage, seen, hint, live),
      h("div", { class: "psx-side" },
        h("div", {}, h("h4", {}, "Latents: 1 leaves them as they are, 0 turns them off"), sliders, h("div", { class: "psx-bar" }, finder.element, add)),
        h("div", {}, h("h4", {}, "Class probabilities"), h("p", { class: "psx-key" }, h("span", { class: "psx-before" }, "before"), h("span", { class: "psx-after" }, "after")), bars, said),
        others.element,
        h("div", {}, h("h4", {}, "The same in Python"), h("div", { class: "psx-code" }, code, copy)),
      ),
    ),
  );

  let [card, picture, cursor] = [null, null, -1];
  let dragged = null; // patches that a drag has touched, and whether it selects or deselects
  const percent = (share) => `${(100 * share).toFixed(share > 0.0995 || share === 0 ? 0 : 1)} %`;
  const points = (change) => (Math.abs(change) < 0.0005 ? "" : ` (${change < 0 ? "−" : "+"}${(100 * Math.abs(change)).toFixed(Math.abs(change) < 0.0995 ? 1 : 0)})`);
  const showOdds = barsOf(bars, ["psx-before", "psx-after"], (before, after) => `${percent(before)} → ${percent(after)}${points(after - before)}`);
  const decoder = decoding();

  async function showCard() {
    const next = page.get("shown");
    const opened = await decoder(next.jpeg);
    if (!opened) return; // overtaken by a later card
    [card, picture] = [next, opened];
    title.textContent = shownOf(next);
    steps.show(next.image);
    legend.show(next.scale);
    code.textContent = next.code;
    const active = bytes(next.heat).some((code) => code > 0);
    const what = titled(next.latent, next.name);
    seen.textContent = next.latent < 0 ? "Choose a latent by its number to see where it is active." : active ? `${what}: where it is active${next.edited ? ", as edited" : ""}` : `${what} is active on no patch of this image${next.edited ? " as edited" : ""}.`;
    fillSliders(card.sliders);
    showOdds(card.bars);
    said.textContent = card.sliders.some((slider) => slider.edited) ? card.bars.slice(0, 2).map(([name, before, after]) => `${name} ${percent(before)}, now ${percent(after)}`).join(". ") : "";
    stage.setAttribute("aria-label", `${shownOf(next)}. ${next.patches.length} of ${rows * columns} patches selected.`);
    draw();
  }

  async function showOthers() {
    const next = page.get("others");
    others.element.hidden = !next.images;
    if (next.images) await others.show(next);
  }

  // -- sliders: rows are kept and filled anew, so that the focus stays where it is --
  const fillSliders = rowsIn(
    sliders,
    () => {
      const row = { number: h("b"), name: h("span"), range: h("input", { type: "range" }), value: h("output") };
      row.pick = h("button", { class: "psx-pick", type: "button", onclick: () => page.set("latent", page.get("latent") === row.latent ? -1 : row.latent) }, row.number, row.name);
      row.op = h("select", { onchange: () => change(row, row.op.value, row.op.value === "scale" ? 1 : 0) }, h("option", { value: "scale" }, "×"), h("option", { value: "add" }, "+"));
      row.off = h("button", { class: "psx-step", type: "button", onclick: () => change(row, "scale", 0) }, "off");
      row.remove = h("button", { class: "psx-step", type: "button", onclick: () => page.set("latents", page.get("latents").filter((l) => l !== row.latent)) }, "✕");
      row.range.addEventListener("input", () => change(row, row.op.value, Number(row.range.value)));
      row.element = h("li", {}, row.pick, row.op, row.range, row.value, row.off, row.remove);
      return row;
    },
    (row, slider) => {
      const what = `latent ${slider.latent}${slider.name ? `, ${slider.name}` : ""}`;
      row.latent = row.number.textContent = slider.latent;
      row.name.textContent = slider.name || `patches ${short(slider.most)}, CLS ${short(slider.cls)}`;
      row.pick.title = `${what}: in this image at most ${short(slider.most)} on a patch, ${short(slider.cls)} at CLS`;
      row.pick.setAttribute("aria-pressed", card.latent === slider.latent);
      const labels = [[row.pick, `Show where ${what} is active`], [row.op, `Multiply or add: ${what}`], [row.off, `Turn off ${what}`], [row.remove, `Remove the slider of ${what}`], [row.range, `Strength of ${what}`]];
      for (const [element, label] of labels) element.setAttribute("aria-label", label);
      row.element.classList.toggle("psx-edited", slider.edited);
      // A hand on the slider is ahead of the card that comes back.
      const pending = page.get("edits").find((edit) => edit.latent === slider.latent);
      showRow(row, pending?.op ?? "scale", pending?.value ?? 1, slider.limit);
    },
  );
  function showRow(row, op, value, limit) {
    row.limit = limit;
    row.op.value = op;
    const [min, max, step] = op === "scale" ? [0, 4, 0.1] : [-limit, 4 * limit, limit / 20];
    Object.assign(row.range, { min, max, step });
    row.range.value = value;
    row.value.textContent = op === "scale" ? `×${value.toFixed(1)}` : `${value < 0 ? "−" : "+"}${short(Math.abs(value))}`;
    row.range.setAttribute("aria-valuetext", op === "scale" ? `times ${value.toFixed(1)}` : `plus ${value.toPrecision(2)}`);
  }
  function change(row, op, value) {
    const others = page.get("edits").filter((edit) => edit.latent !== row.latent);
    showRow(row, op, value, row.limit);
    page.set("edits", op === "scale" && value === 1 ? others : [...others, { latent: row.latent, op, value }]);
  }

  // -- the picture and its patches --
  function draw() {
    if (!card) return;
    paint(stage, SIZE.stage, picture, card.latent < 0 ? null : bytes(card.heat), lookOf(page, card.scale));
    const context = stage.getContext("2d");
    const side = [stage.width / columns, stage.height / rows];
    const selected = dragged ? dragged.patches : new Set(page.get("patches"));
    context.fillStyle = "rgba(230, 159, 0, 0.3)";
    for (const patch of selected) context.fillRect((patch % columns) * side[0], Math.floor(patch / columns) * side[1], ...side);
    border(context, (patch) => selected.has(patch), [rows, columns]);
    if (document.activeElement === stage || dragged) outline(context, cursor, side, columns, 1);
  }
  function touch(patch) {
    cursor = patch;
    dragged.selects ? dragged.patches.add(patch) : dragged.patches.delete(patch);
    draw();
  }
  // A selection is made to be edited: the first one turns the edits to it.
  function choose(patches) {
    const turns = patches.length && !page.get("patches").length && page.get("where") !== "selected";
    page.set(turns ? { patches, where: "selected" } : { patches });
  }

  stage.addEventListener("pointerdown", (event) => {
    const patch = patchAt(event, stage, [rows, columns]);
    dragged = { patches: new Set(page.get("patches")), selects: !page.get("patches").includes(patch) };
    stage.setPointerCapture(event.pointerId);
    touch(patch);
  });
  stage.addEventListener("pointermove", (event) => dragged && patchAt(event, stage, [rows, columns]) !== cursor && touch(patchAt(event, stage, [rows, columns])));
  const drop = () => {
    if (!dragged) return;
    const patches = [...dragged.patches].sort((a, b) => a - b);
    dragged = null;
    choose(patches);
  };
  stage.addEventListener("pointerup", drop);
  stage.addEventListener("pointercancel", () => ((dragged = null), draw()));
  stage.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step && ![" ", "Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") return choose([]);
    if (cursor < 0) cursor = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    else if (step) cursor = stepped(cursor, step, [rows, columns]);
    const chosen = new Set(page.get("patches"));
    if (!step) {
      chosen.delete(cursor) || chosen.add(cursor);
      choose([...chosen].sort((a, b) => a - b));
    }
    live.textContent = `${placeOf(cursor, columns)}, ${chosen.has(cursor) ? "selected" : "not selected"}`;
    draw();
  });
  for (const event of ["focus", "blur"]) stage.addEventListener(event, draw);

  page.on(["shown"], showCard);
  page.on(["others"], showOthers);
  page.on(["patches", ...LOOK], draw);
  page.run(showCard);
  page.run(showOthers);
  return () => (decoder.close(), others.close());
}
