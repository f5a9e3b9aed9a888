// The latent explorer.

// prettier-ignore
import {
  ARROWS, act, bytes, contextOf, controls, div, finderOf, h, listOf, namesOf, referencesOf, rowsIn, select, short, signed, sorted, titled,
  widget, words,
} from "./explorer.js";

export default widget(latentView);

/** @import { Page } from "./explorer.js" */

/** @param {Page} page @param {HTMLElement} root */
function latentView(page, root) {
  const sort = select(
    page,
    "sort",
    "Sort by",
    page.get("sorts").map((name) => [name, sorted(name)]),
  );
  const slide = () => order.length && page.set("latent", order[Number(slider.value)]);
  const slider = h("input", { type: "range", min: 0, step: 1, "aria-label": "Latent, in the chosen order", oninput: slide });
  const place = h("output", { class: "psx-soft" });
  const title = h("h3", { "aria-live": "polite" });
  const facts = h("dl", { class: "psx-facts" });
  const names = namesOf(page);
  const scatter = scatterOf(page);
  const classes = listOf(page, "Classes, share of its active tokens", { look: "psx-odds" });
  const references = referencesOf(page, "Reference images, strongest first");
  const near = listOf(page, "Nearest latents, by cosine of their decoder directions", { look: "psx-chips", marks: [], word: "cosine" });
  const effect = effectOf(page);
  const look = controls(page);
  const body = div(
    "psx-body",
    div("psx-side", div("", title, keeperOf(page), facts), scatter.element, classes.element),
    div("psx-side", references.element, near.element, effect.element),
  );
  const finder = div("psx-bar", finderOf(page), h("label", { class: "psx-grow" }, "Latent", slider), place, sort);
  root.append(finder, look.element, body);

  let order = new Uint32Array();
  let card = null;
  let asked = null; // the latent whose card was drawn last, or is being drawn
  let idle = 0;
  const known = new Map(); // the last cards that came

  function showSelection() {
    const latent = page.get("latent");
    const rank = order.indexOf(latent);
    if (rank >= 0) slider.value = String(rank);
    place.textContent = rank < 0 ? "" : `${rank + 1} of ${order.length}`;
    slider.setAttribute("aria-valuetext", rank < 0 ? "none" : `latent ${latent}, ${place.textContent} by ${sorted(page.get("sort"))}`);
    page.busy(body, (card?.latent ?? -1) !== latent);
  }
  async function showCard(next) {
    if (asked === page.get("latent")) return; // an answer to an earlier step, or to one that needed none
    asked = next.latent;
    if (!(await references.show(next))) return; // overtaken by a later card
    card = next;
    title.textContent = titled(next.latent, next.name);
    facts.replaceChildren(...next.facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    scatter.say(next.facts.map((fact) => fact.join(" ")).join(", "));
    classes.show(next.classes.map(([name, share]) => ({ name, values: [share], text: `${Math.round(100 * share)} %` })));
    near.show(latentsOf(next.neighbors));
    look.show(next.scale);
    showSelection();
    rest(200);
    effect.ask();
  }
  // While nothing happens Python sends what a next step would show, one card after the other: a click waits for one at most.
  function rest(patience) {
    clearTimeout(idle);
    idle = page.after(patience, () => {
      const rank = order.indexOf(page.get("latent"));
      const next = rank < 0 || card?.latent !== page.get("latent") ? [] : [1, -1, 2].map((step) => order[rank + step]);
      const latent = next.find((one) => one !== undefined && !known.has(one));
      if (latent !== undefined) page.send({ kind: "prefetch", latent });
    });
  }
  page.follow(["order"], () => {
    order = words(page.get("order"), Uint32Array);
    slider.max = String(Math.max(0, order.length - 1));
    showSelection();
  });
  page.on(["names"], () => (title.textContent = titled(page.get("latent"), names.of(page.get("latent")))));
  page.on(["latent"], () => {
    clearTimeout(idle);
    showSelection();
    const early = known.get(page.get("latent"));
    return early && showCard(early);
  });
  page.on(["ahead"], () => {
    const next = page.get("ahead");
    known.set(next.latent, next);
    if (known.size > 12) known.delete(known.keys().next().value);
    rest(20);
    return references.expect(next);
  });
  page.follow(["shown"], () => showCard(page.get("shown")));
}

const latentsOf = (rows) => rows.map(([latent, name, value]) => ({ latent, name, values: [value], text: value.toFixed(2) }));

/** What the latent does, beyond its strongest images: asked for while it is open, once the latent rests. @param {Page} page */
function effectOf(page) {
  const histogram = h("div", { class: "psx-hist", role: "img", "aria-label": "Histogram of its activations" });
  const ends = [h("span"), h("span", {}, "activation on a token, doubling every second bar"), h("span")];
  const examples = referencesOf(page, "Images where it is middling, then weak");
  const pushes = listOf(page, "Classes it pushes up and down: logit lost without it, mean over its reference images", { look: "psx-odds" });
  const together = listOf(page, "Active in the same images, by correlation", { look: "psx-chips", marks: [], word: "correlation" });
  const status = h("p", { class: "psx-status" });
  const bins = div("", h("h4", {}, "How strongly it is active"), histogram, div("psx-axis", ...ends));
  const places = Object.fromEntries(page.get("places").map((name) => [name, referencesOf(page, `Elsewhere: ${name}`)]));
  const elsewhere = Object.values(places).map((place) => place.element);
  const content = h("div", { class: "psx-side", hidden: "" }, bins, examples.element, pushes.element, together.element, ...elsewhere);
  const fillBin = ({ element: bin }, [share, text]) => {
    bin.style.setProperty("--share", share);
    bin.title = text;
  };
  const showBins = rowsIn(histogram, () => ({ element: h("div") }), fillBin);
  let later = 0;
  const ask = () => {
    clearTimeout(later);
    if (!element.open || page.get("latent") < 0 || page.get("effect").latent === page.get("latent")) return;
    status.textContent = content.hidden ? "Reading a sample of the images: some seconds, once." : "";
    page.busy(content, true);
    later = page.after(250, () => page.send({ kind: "does", latent: page.get("latent") }));
  };
  const element = h("details", { class: "psx-does", ontoggle: ask }, h("summary", {}, "What does it do?"), status, content);
  page.on(["notice"], () => page.get("notice") && (status.textContent = "")); // it failed, and the page says why
  page.follow(["effect"], async () => {
    const next = page.get("effect");
    if (next.latent === undefined) return;
    const total = next.counts.reduce((sum, count) => sum + count, 0);
    const most = Math.max(...next.counts, 1);
    showBins(next.counts.map((count, i) => [count / most, `${short(next.edges[i])} to ${short(next.edges[i + 1])}: ${count} tokens`]));
    [ends[0].textContent, ends[2].textContent] = [short(next.edges[0]), short(next.edges.at(-1))];
    histogram.setAttribute("aria-label", `Histogram of ${total} active tokens by activation`);
    pushes.show(next.pushes.map(([name, value, low, high]) => ({ name, values: [value], text: `${signed(value)} [${signed(low)}, ${signed(high)}]` })));
    together.show(latentsOf(next.together));
    content.hidden = false;
    status.textContent = "";
    page.busy(content, next.latent !== page.get("latent"));
    elsewhere.forEach((element) => page.busy(element, true));
    await examples.show(next);
    askNext(-1);
  });
  // One place after the other, so that what is clicked meanwhile is answered in between.
  function askNext(done) {
    const place = page.get("places")[done + 1];
    const latent = page.get("latent");
    if (place !== undefined && element.open && page.get("effect").latent === latent) page.send({ kind: "elsewhere", latent, place });
  }
  page.on(["place"], async () => {
    const next = page.get("place");
    if (next.latent !== page.get("latent")) return;
    page.busy(places[next.place].element, false);
    await places[next.place].show(next);
    askNext(page.get("places").indexOf(next.place));
  });
  return { element, ask };
}

/** One's own words on a latent: Python keeps them in a file. @param {Page} page */
function keeperOf(page) {
  let held = -1; // the latent whose words are being written
  const send = (latent, words) => latent >= 0 && page.send({ kind: "keep", latent, ...words });
  const mine = () => page.get("kept")[page.get("latent")] ?? {};
  const said = { "aria-label": "Star this latent", title: "Search for * to find the starred ones" };
  const star = act("☆", () => send(page.get("latent"), { star: !mine().star }), said);
  const kept = (name) => ({ onfocus: () => (held = page.get("latent")), onchange: () => send(held, { [name]: fields[name].value }), onblur: show });
  const show = () => {
    star.textContent = mine().star ? "★" : "☆";
    star.setAttribute("aria-pressed", String(Boolean(mine().star)));
    for (const [name, field] of Object.entries(fields)) if (document.activeElement !== field) field.value = mine()[name] ?? "";
  };
  const fields = {
    name: h("input", { type: "text", placeholder: "your name for it", "aria-label": "Your name for this latent", maxlength: 80, ...kept("name") }),
    note: h("textarea", { rows: 1, placeholder: "note", "aria-label": "Note on this latent", maxlength: 2000, ...kept("note") }),
  };
  page.follow(["kept", "latent"], show);
  return div("psx-keep", star, fields.name, fields.note);
}

/** A point for each latent, from two bytes each (0 0: dead), and a mark on the chosen one; click and arrow keys choose. @param {Page} page */
function scatterOf(page) {
  const cloud = h("canvas", { width: 510, height: 300, "aria-hidden": "true" });
  const mark = h("i");
  const points = () => bytes(page.get("points"));
  // The living latent for which `cost(x, y)` is least; -1 where it is infinite for all.
  const least = (cost) => {
    let [best, lowest] = [-1, Infinity];
    points().forEach((x, i, all) => {
      const now = i % 2 || !x ? Infinity : cost(x, all[i + 1]);
      if (now < lowest) [best, lowest] = [i / 2, now];
    });
    return best;
  };
  const choose = (latent) => latent >= 0 && page.set("latent", latent);
  const near = (event) => {
    const box = cloud.getBoundingClientRect();
    const [x, y] = [1 + (254 * (event.clientX - box.left)) / box.width, 1 + (254 * (box.bottom - event.clientY)) / box.height];
    choose(least((px, py) => ((px - x) * box.width) ** 2 + ((py - y) * box.height) ** 2));
  };
  // The nearest point in the direction of an arrow key: what lies off it counts twice.
  const beside = (event) => {
    if (!ARROWS[event.key] || page.get("latent") < 0) return;
    event.preventDefault();
    const [down, right] = ARROWS[event.key];
    const [x, y] = points().subarray(2 * page.get("latent"));
    const ahead = (px, py) => right * (px - x) - down * (py - y);
    choose(least((px, py) => (ahead(px, py) > 0 ? ahead(px, py) + 2 * Math.abs(right ? py - y : px - x) : Infinity)));
  };
  const spoken = { role: "application", tabindex: 0, "aria-roledescription": "scatter of latents" };
  const map = h("div", { class: "psx-scatter", ...spoken, onclick: near, onkeydown: beside }, cloud, mark);
  const axis = div("psx-axis", h("span", {}, "rare"), h("span", {}, "→ frequency, ↑ activation"), h("span", {}, "common"));
  page.follow(["points"], () => {
    const context = contextOf(cloud);
    context.clearRect(0, 0, cloud.width, cloud.height);
    context.fillStyle = "rgba(128, 128, 128, 0.35)"; // shows on light and dark pages alike
    points().forEach((x, i, all) => i % 2 || !x || context.fillRect(2 * x - 2, 296 - (296 * (all[i + 1] - 1)) / 254, 4, 4));
  });
  page.follow(["points", "latent"], () => {
    const [x = 0, y = 0] = points().subarray(2 * Math.max(0, page.get("latent")));
    mark.hidden = page.get("latent") < 0 || !x;
    mark.style.setProperty("--x", String((x - 1) / 254));
    mark.style.setProperty("--y", String((y - 1) / 254));
  });
  const say = (facts) => map.setAttribute("aria-label", `Each latent by frequency and mean activation; the chosen one is marked, arrow keys move it. ${facts}`);
  return { element: div("", h("h4", {}, "Among all latents"), map, axis), say };
}
