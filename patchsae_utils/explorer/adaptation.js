// The adaptation view.

import { ARROWS, LOOK, SIZE, barsOf, bytes, controls, decoding, fillBar, finderOf, h, imageSteps, legendOf, lookOf, namesOf, outline, paint, patchAt, placeOf, rowsIn, select, stepped, strongest, three, titled, widget } from "./explorer.js";

export default widget(adaptationView);

function adaptationView(page, root) {
  const [rows, columns] = page.get("grid");
  const names = namesOf(page);
  const tasks = Object.fromEntries(page.get("tasks").map((task) => [task, task]));
  const steps = imageSteps(page);
  const finder = finderOf(page);
  const title = h("h3", { "aria-live": "polite" });
  const chosen = h("p", { class: "psx-status" });
  const ranked = h("p", { class: "psx-soft", "aria-live": "polite" });
  const sides = ["base", "adapted"].map((side) => ({ head: h("h4", { class: `psx-${side}` }), canvas: h("canvas", { class: "psx-stage", role: "application", tabindex: 0, "aria-roledescription": "grid of patches" }), most: h("p", { class: "psx-soft" }) }));
  const groups = Object.fromEntries(["common", "base", "adapted"].map((name) => [name, groupOf()]));
  const bars = h("ol", { class: "psx-odds", "aria-label": "Class probabilities by both models" });
  const key = ["base", "adapted"].map((side) => h("span", { class: `psx-${side}` }));
  const legend = legendOf(page);
  root.append(
    h("div", { class: "psx-bar" }, select(page, "task", "Task", tasks), ...steps.elements, finder.element),
    h("div", { class: "psx-bar" }, ...controls(page), legend.element),
    h("div", { class: "psx-body" },
      h("div", {}, title, h("div", { class: "psx-pair" }, ...sides.map((side) => h("div", {}, side.head, side.canvas, side.most))), chosen),
      h("div", { class: "psx-side" }, h("div", {}, h("h4", {}, "Class probabilities"), h("p", { class: "psx-key" }, ...key), bars), ranked, ...Object.values(groups).map((group) => group.element)),
    ),
  );

  let [card, picture] = [null, null];
  const showOdds = barsOf(bars, ["psx-base", "psx-adapted"], (base, adapted) => `${Math.round(100 * base)} % | ${Math.round(100 * adapted)} %`);
  const decoder = decoding();

  function groupOf() {
    const heading = h("h4");
    const list = h("ol", { class: "psx-twins" });
    let [shown, most] = [[], 1];
    const fillRows = rowsIn(
      list,
      () => {
        const row = { number: h("b"), name: h("span"), bars: ["base", "adapted"].map((side) => h("div", { class: `psx-fill psx-${side}`, "aria-hidden": "true" })), value: h("i") };
        row.button = h("button", { class: "psx-pick", type: "button", onclick: () => page.set("latent", row.latent) }, row.number, row.name, h("div", {}, ...row.bars), row.value);
        row.element = h("li", {}, row.button);
        return row;
      },
      (row, [latent, word, ...values]) => {
        row.latent = row.number.textContent = latent;
        row.name.textContent = row.name.title = word;
        row.bars.forEach((bar, k) => fillBar(bar, values[k], most));
        row.value.textContent = values.map((value) => value.toPrecision(2)).join(" | ");
        row.button.setAttribute("aria-label", `${titled(latent, word)}: mean activation ${three(values[0])} in CLIP, ${three(values[1])} adapted`);
      },
    );
    return {
      element: h("div", {}, heading, list),
      show(latents, text, scale) {
        heading.textContent = `${text}${latents.length ? "" : ": none"}`;
        list.setAttribute("aria-label", text);
        most = scale;
        shown = fillRows(latents);
      },
      mark: () => shown.forEach((row) => row.button.setAttribute("aria-pressed", row.latent === page.get("latent"))),
    };
  }
  async function showCard() {
    const next = page.get("shown");
    const opened = await decoder(next.jpeg);
    if (!opened) return; // overtaken by a later card
    [card, picture] = [next, opened];
    title.textContent = `Image ${next.image} · ${next.label}`;
    steps.show(next.image);
    ranked.textContent = `${next.patch < 0 ? "Latents by their mean activation in this image (click a patch for its own)" : `${placeOf(next.patch, columns)}: latents by their activation there`}; each list has its own scale.`;
    ["CLIP", next.adapter].forEach((word, i) => (sides[i].head.textContent = key[i].textContent = word));
    const texts = { common: "Common: strong in both", base: `CLIP only: at least halved by ${next.adapter}`, adapted: `${next.adapter} only: at least doubled` };
    // Latents that change are often weak ones: each list has its own scale, and says its numbers.
    const most = (group) => Math.max(...group.flatMap((row) => row.slice(2)), 1e-9);
    for (const name in texts) groups[name].show(next.groups[name], texts[name], most(next.groups[name]));
    showOdds(next.bars).forEach((row, i) => row.name.classList.toggle("psx-true", next.bars[i][0] === next.label));
    showSelection();
  }
  // Both masks of a listed latent are here already, so that a choice needs no answer from Python.
  function showSelection() {
    if (!card) return;
    const latent = page.get("latent");
    Object.values(groups).forEach((group) => group.mark());
    chosen.classList.toggle("psx-chosen", latent >= 0);
    chosen.textContent = latent < 0 ? "Choose a latent to see where it is in both." : titled(latent, names.get(latent));
    draw();
  }
  function draw() {
    if (!card) return;
    const size = rows * columns;
    const place = card.listed.indexOf(page.get("latent"));
    const scale = place < 0 ? 1 : card.scales[place];
    legend.show(scale);
    sides.forEach((side, i) => {
      const codes = place < 0 ? null : bytes(card.heats).subarray((2 * place + i) * size, (2 * place + i + 1) * size);
      paint(side.canvas, SIZE.stage, picture, codes, lookOf(page, scale));
      outline(side.canvas.getContext("2d"), page.get("patch"), [side.canvas.width / columns, side.canvas.height / rows], columns, 3);
      const most = codes ? three(scale * (Math.max(...codes) / 255) ** 2) : "";
      side.most.textContent = codes ? `at most ${most} on a patch` : "\u00a0";
      side.canvas.setAttribute("aria-label", `${side.head.textContent}: image ${card.image}, ${card.label}${codes ? `; latent ${page.get("latent")}, at most ${most}${strongest(codes, page.get("grid"))}` : ""}`);
    });
  }
  // A patch, and the latents of both models there; once more, or Escape, takes it back.
  const choose = (patch) => page.set("patch", patch === page.get("patch") ? -1 : patch);
  for (const { canvas } of sides) {
    canvas.addEventListener("click", (event) => choose(patchAt(event, canvas, [rows, columns])));
    canvas.addEventListener("keydown", (event) => {
      const [step, at] = [ARROWS[event.key], page.get("patch")];
      if (!step && event.key !== "Escape") return;
      event.preventDefault();
      page.set("patch", !step ? -1 : at < 0 ? (rows >> 1) * columns + (columns >> 1) : stepped(at, step, [rows, columns]));
    });
  }
  page.on(["shown"], showCard);
  page.on(["latent"], showSelection);
  page.on(["patch", ...LOOK], draw);
  page.run(showCard);
  return () => decoder.close();
}
