// The adaptation view.

// prettier-ignore
import {
  bytes, controls, div, finderOf, h, imageSteps, listOf, namesOf, placeOf, select, short, split, stageOf, strongest, three, titled, widget,
} from "./explorer.js";

export default widget(adaptationView);

const MARKS = ["psx-base", "psx-adapted"];
const GROUPS = ["common", "base", "adapted"];

/** @import { Page } from "./explorer.js" */

/** @param {Page} page @param {HTMLElement} root */
function adaptationView(page, root) {
  const names = namesOf(page);
  const title = h("h3", { "aria-live": "polite" });
  const said = h("p", { class: "psx-status" });
  const ranked = h("p", { class: "psx-soft", "aria-live": "polite" });
  const chosen = () => (page.get("patch") < 0 ? [] : [page.get("patch")]);
  const choose = (patches, last) => page.set("patch", patches.includes(last) && last !== page.get("patch") ? last : -1); // once more takes it back
  const sides = MARKS.map((mark, i) => {
    const side = { title: h("h4", { class: mark }), most: h("p", { class: "psx-soft" }) };
    return { ...side, stage: stageOf(page, { title: side.title, chosen, choose, heat: () => heat(i) }) };
  });
  const groups = GROUPS.map(() => listOf(page, "", { marks: MARKS, word: "activation in CLIP and adapted" }));
  const odds = listOf(page, "Class probabilities", { look: "psx-odds", marks: MARKS });
  const key = MARKS.map((mark) => h("span", { class: mark }));
  const look = controls(page);
  const pair = div("psx-pair", ...sides.map((side) => div("", side.stage.element, side.most)));
  const body = div(
    "psx-body",
    div("", title, pair, said),
    div("psx-side", div("", odds.element, h("p", { class: "psx-key" }, ...key)), ranked, ...groups.map((group) => group.element)),
  );
  const tasks = Object.fromEntries(page.get("tasks").map((task) => [task, task]));
  root.append(div("psx-bar", select(page, "task", "Task", tasks), ...imageSteps(page), finderOf(page)), look.element, body);
  let card = null;

  // Both masks of a listed latent are here already, so that a choice needs no answer from Python.
  function heat(side) {
    const place = card.listed.indexOf(page.get("latent"));
    return place < 0 ? [null, 1] : [split(bytes(card.heats), page)[2 * place + side], card.scales[place]];
  }
  function showSelection() {
    if (!card) return;
    const latent = page.get("latent");
    said.classList.toggle("psx-chosen", latent >= 0);
    said.textContent = latent < 0 ? "Choose a latent to see where it is in both." : titled(latent, names.of(latent));
    look.show(heat(0)[1]);
    sides.forEach(({ title: { textContent: model }, stage, most }, i) => {
      const [codes, scale] = heat(i);
      const peak = codes ? `at most ${three(scale * (Math.max(...codes) / 255) ** 2)}` : "";
      most.textContent = codes ? `${peak} on a patch` : "\u00a0";
      stage.label(`${model}: image ${card.image}, ${card.label}${codes ? `; latent ${latent}, ${peak}${strongest(codes, page.get("grid"))}` : ""}.`);
      stage.draw();
    });
  }
  const wait = () => page.busy(body, card?.image !== page.get("image") || card?.task !== page.get("task"));
  page.on(["image", "task"], wait);
  page.on(["latent"], showSelection);
  page.follow(["shown"], async () => {
    const next = page.get("shown");
    const shown = await Promise.all(["CLIP", next.adapter].map((model, i) => sides[i].stage.show(next, (key[i].textContent = model))));
    if (!shown.every(Boolean)) return; // overtaken by a later card
    card = next;
    wait();
    title.textContent = `Image ${next.image} · ${next.label}`;
    const place = placeOf(next.patch, page.get("grid")[1]);
    const where = next.patch < 0 ? "Latents by their mean activation in this image (click a patch for its own)" : `${place}: latents by their activation there`;
    ranked.textContent = `${where}; each list has its own scale.`;
    const texts = ["Common: strong in both", `CLIP only: at least halved by ${next.adapter}`, `${next.adapter} only: at least doubled`];
    const both = (values, form) => ({ values, text: values.map(form).join(" | ") });
    GROUPS.forEach((group, i) => {
      const rows = next.groups[group].map(([latent, name, ...values]) => ({ latent, name, ...both(values, short) }));
      groups[i].show(rows, { now: texts[i], nothing: "none" });
    });
    const percent = (share) => `${Math.round(100 * share)} %`;
    const bars = next.bars.map(([name, ...values]) => ({ name: name === next.label ? `✓ ${name}` : name, ...both(values, percent) }));
    odds.show(bars, { scale: 1 });
    showSelection();
  });
}
