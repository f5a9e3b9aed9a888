// The patch explorer.

// prettier-ignore
import {
  bytes, controls, div, h, imageSteps, listOf, namesOf, placeOf, referencesOf, select, shownOf, split, stageOf, three, titled, uploadOf,
  widget, words,
} from "./explorer.js";

export default widget(patchView);

const RANKS = { activation: "activation", distinctive: "distinctiveness", contrast: "here, not elsewhere", prediction: "what a class owes" };
const HINT = "Point at a patch to see its latents, click to choose it; Shift and click, drag or arrow keys choose several. Escape takes the choice back.";

/** @import { Page } from "./explorer.js" */

/** @param {Page} page @param {HTMLElement} root */
function patchView(page, root) {
  const columns = page.get("grid")[1];
  const ranks = page.get("ranks").map((name) => [name, RANKS[name]]);
  const rank = select(page, "rank", "List by", ranks);
  const target = select(page, "target", "Class", [[-1, "the predicted one"], ...page.get("classes").map((name, i) => [i, name])]);
  const names = namesOf(page);
  const title = h("h3");
  const most = h("p", { class: "psx-soft" });
  const references = referencesOf(page, "Its strongest images in the data set");
  const [here, whole] = ["Chosen patch", "Whole image"].map((heading) => listOf(page, heading, { word: "activation" }));
  const look = controls(page);
  const choose = (patches, last) => page.set({ patches, patch: patches.includes(last) ? last : (patches.at(-1) ?? -1) });
  const stage = stageOf(page, { hint: HINT, heat, choose, pointed: showLists });
  const body = div("psx-body", stage.element, div("psx-side", div("psx-lists", here.element, whole.element), div("", title, most), references.element));
  root.append(div("psx-bar", ...imageSteps(page), ...uploadOf(page, root), rank, target), look.element, body);
  let card = null;

  // The heat map of the chosen latent: with a listed latent it is here already, before Python has answered.
  function heat() {
    const latent = page.get("latent");
    const place = card.listed.indexOf(latent);
    if (latent >= 0 && card.latent === latent) return [bytes(card.heat), card.scale];
    return place < 0 ? [null, 1] : [split(bytes(card.listed_heats), page)[place], card.listed_scales[place]];
  }
  // A patch's latents, of which Python sent the strongest when the image came.
  function topsOf(patch) {
    const { latents, values, n } = page.get("tops");
    const [which, value] = [words(latents, Uint32Array), words(values, Float32Array)].map((all) => [...all.subarray(patch * n, (patch + 1) * n)]);
    const owed = page.get("rank") === "prediction";
    const text = (one) => (owed ? `${one > 0 ? "+" : ""}${one.toPrecision(2)}` : three(one));
    const rows = which.map((latent, i) => ({ latent, name: names.of(latent), values: [value[i]], text: text(value[i]) }));
    return rows.filter((_, i) => (owed ? value[i] !== 0 : value[i] > 0));
  }
  const entries = (latents) => latents.map(({ latent, name, value, text }) => ({ latent, name, values: [value], text }));
  function showLists() {
    if (!card) return;
    const chosen = page.get("patches");
    const under = stage.under();
    const pointed = under >= 0 && !chosen.includes(under);
    const told = !pointed && (chosen.length > 1 || page.get("rank") === "contrast"); // the mean, and the rest of the image, are Python's
    const now = pointed ? "Patch under the pointer" : chosen.length > 1 ? `${chosen.length} chosen patches, mean` : "Chosen patch";
    const patch = pointed ? under : (chosen[0] ?? -1);
    page.busy(here.element, told && card.patches.length !== chosen.length); // of other patches still
    const nothing = patch < 0 ? "None yet: point at the image." : "No latent is active here.";
    here.show(told ? entries(card.patch_latents) : patch < 0 ? [] : topsOf(patch), { now, nothing });
  }
  function showSelection() {
    if (!card) return;
    const latent = page.get("latent");
    target.hidden = page.get("rank") !== "prediction";
    page.busy(body, card.image !== page.get("image") || card.uploaded !== page.get("uploaded"));
    title.textContent = latent < 0 ? "" : titled(latent, names.of(latent));
    const peak = card.latent === latent ? `In this image: at most ${card.most} on a patch, ${card.cls} at CLS.` : "\u00a0";
    most.textContent = latent < 0 ? "Choose a latent to see where it is." : peak;
    whole.show(entries(card.image_latents), { now: card.said || "Whole image", nothing: "No latent is active." });
    look.show(heat()[1]);
    showLists();
    stage.draw();
  }
  page.on(["tops", "image", "uploaded", "patches", "latent", "rank"], showSelection);
  page.follow(["shown"], async () => {
    const next = page.get("shown");
    const spot = next.patches.length > 1 ? `${next.patches.length} patches chosen` : next.patch < 0 ? "" : placeOf(next.patch, columns);
    if (!(await stage.show(next, shownOf(next)))) return; // overtaken by a later card
    card = next;
    stage.label(`${shownOf(next)}. ${spot || "No patch chosen"}.`);
    const top = next.patch_latents[0];
    stage.say(spot && `${spot}. ${top ? `Strongest: latent ${top.latent}${top.name ? `, ${top.name}` : ""}` : "No latent is active here"}.`);
    showSelection();
  });
  page.follow(["found"], async () => {
    const next = page.get("found");
    if (await references.show(next)) references.element.hidden = !next.images.length;
  });
}
