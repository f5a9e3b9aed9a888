// What all explorers share. Python sends a card (facts, JPEG bytes, one byte a patch); the page draws it.
// Each view is a module that imports this one; module() in widgets.py makes one file of the two. Texts are set as text nodes only, never as HTML.

/** @typedef {ReturnType<typeof pageOf>} Page */

export const LOOK = ["tau", "opacity", "mode", "contour"]; // how heat maps look
export const SIZE = { reference: 160, stage: 448 };
const UPLOAD_BYTES = 8 * 2 ** 20; // as in reader.py
const PATIENCE = 20_000; // milliseconds that Python may take to answer
const SILENT = "Python has not answered for long: its kernel is busy, or gone.";

/** An anywidget module that shows one view: `view(page, root)` fills the root. @param {(page: Page, root: HTMLElement) => void} view */
export function widget(view) {
  return {
    render({ model, el }) {
      // Jupyter leaves shortcuts alone inside such an element; but Enter it would take from a field, which then never says that it changed.
      const root = h("section", { class: `psx psx-${model.get("kind")}`, "data-lm-suppress-shortcuts": "true" });
      root.addEventListener("keydown", (event) => event.key === "Enter" && event.stopPropagation());
      const page = pageOf(model, root);
      el.append(root);
      page.run(() => {
        view(page, root);
        if (page.get("choices")) sharing(page, root);
      });
      return page.close;
    },
  };
}

/** What a view knows of its widget. @param {any} model @param {HTMLElement} root */
function pageOf(model, root) {
  const notice = h("p", { class: "psx-notice", role: "alert" });
  /** @type {(() => void)[]} */
  const ends = [];
  const waiting = new Map();
  const fail = (error) => {
    console.error(error);
    page.tell(`This view could not be drawn: ${error.message ?? error}`);
  };
  const page = {
    get: (name) => model.get(name),
    /** One choice, or several at once: set({ name: value, ... }). */
    set(/** @type {any} */ name, /** @type {any} */ value = undefined) {
      for (const [key, chosen] of Object.entries(typeof name === "string" ? { [name]: value } : name)) model.set(key, chosen);
      model.save_changes();
    },
    /** A message that is no state: a wish, or a file. */
    send: (content, ...buffers) => model.send(content, undefined, buffers),
    on(names, call) {
      const safe = () => page.run(call);
      for (const name of names) {
        model.on(`change:${name}`, safe);
        ends.push(() => model.off(`change:${name}`, safe));
      }
    },
    /** Now, and whenever one of them changes. */
    follow(names, call) {
      page.on(names, call);
      page.run(call);
    },
    /** Whatever fails, now or in a promise, is told in the page. */
    run: (call) => attempt(call, fail),
    /** The same after some milliseconds, unless the view is gone by then. */
    after: (patience, call) => setTimeout(() => root.isConnected && page.run(call), patience),
    tell(text) {
      notice.textContent = text;
      notice.hidden = !text;
    },
    /** Dims what waits for Python, until the answer is drawn, the kernel is gone, or nobody has answered for long. */
    busy(element, waits) {
      clearTimeout(waiting.get(element));
      waiting.delete(element);
      element.classList.toggle("psx-busy", waits);
      if (waits) waiting.set(element, page.after(PATIENCE, silent));
      else if (notice.textContent === SILENT) page.tell(""); // it was only slow
    },
    ending: (call) => void ends.push(call),
    close() {
      ends.forEach((end) => end());
      [...waiting.keys()].forEach((element) => page.busy(element, false));
      root.querySelectorAll("canvas").forEach(free);
      root.remove();
    },
  };
  const alone = (text) => {
    [...waiting.keys()].forEach((element) => page.busy(element, false));
    page.tell(text);
  };
  const silent = () => alone(SILENT);
  const lost = () => alone("The kernel has ended: run the cell again.");
  model.on("comm_live_update", lost);
  ends.push(() => model.off("comm_live_update", lost));
  root.addEventListener("psx-error", (event) => fail(/** @type {CustomEvent} */ (event).detail));
  root.append(notice);
  page.follow(["notice"], () => page.tell(page.get("notice") ?? ""));
  return page;
}

function attempt(call, fail) {
  void (async () => call())().catch(fail);
}

// -- links -----------------------------------------------------------------------------------------------------------------------

// What a link holds: the choices of all views of the page, behind "#psx=".
const views = (globalThis.psxViews ??= new Map());

function wished() {
  try {
    return JSON.parse(decodeURIComponent(location.hash.replace("#psx=", ""))) ?? {};
  } catch {
    return {}; // no link of ours
  }
}

// Buttons that copy a line of Python, and a link, that open what is shown; and what a followed link wishes.
function sharing(page, root) {
  const kind = page.get("kind");
  views.set(kind, page);
  page.ending(() => views.get(kind) === page && views.delete(kind));
  const chosen = (view) => view.get("choices").map((name) => [name, view.get(name)]);
  const argument = ([name, value]) => `${name}=${JSON.stringify(value)}`;
  const python = () => `${[page.get("call"), ...chosen(page).map(argument)].join(", ")})`;
  const link = () => {
    const all = Object.fromEntries([...views].map(([name, view]) => [name, Object.fromEntries(chosen(view))]));
    return `${location.href.split("#")[0]}#psx=${encodeURIComponent(JSON.stringify(all))}`;
  };
  const buttons = [copier(page, "Copy as Python", python)];
  if ((globalThis.jupyterapp?.name ?? "Voila") === "Voila") buttons.push(copier(page, "Copy link", link)); // JupyterLab takes an address's end for its own
  for (const format of ["png", "svg"]) buttons.push(act(`Save as ${format.toUpperCase()}`, () => page.send({ kind: "export", format })));
  page.on(["exported"], () => {
    const file = page.get("exported");
    if (!file.name) return;
    const href = URL.createObjectURL(new Blob([bytes(file.bytes)]));
    h("a", { href, download: file.name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  });
  root.append(div("psx-bar psx-sharing", ...buttons));
  const wish = wished()[kind];
  if (wish) page.send({ kind: "open", selection: wish });
}

/** A button that copies a text; without leave to write to the clipboard the text is told in the page. @param {Page} page */
export function copier(page, label, text) {
  const button = act(label, async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
      page.after(1500, () => (button.textContent = label));
    } catch {
      page.tell(text());
    }
  });
  return button;
}

// -- choosing an image, and a latent by its name ---------------------------------------------------------------------------------

/** A field for an image's index, which takes back what is none, between buttons for the images beside it. @param {Page} page */
export function imageSteps(page) {
  const last = () => page.get("n_images") - 1;
  const choose = (image) => page.set(page.get("uploaded") ? { image, uploaded: "" } : { image });
  const turn = (step) => choose(Math.min(last(), Math.max(0, page.get("image") + step)));
  const back = act("‹", () => turn(-1), { "aria-label": "Previous image" });
  const forth = act("›", () => turn(1), { "aria-label": "Next image" });
  const read = () => {
    const image = Number(field.value);
    if (field.value !== "" && Number.isInteger(image) && image >= 0 && image <= last()) choose(image);
    else field.value = page.get("image");
  };
  const field = h("input", { type: "number", min: 0, step: 1, "aria-label": "Image, by its index", onchange: read });
  page.follow(["image", "n_images"], () => {
    const image = page.get("image");
    field.max = String(last());
    if (document.activeElement !== field || Number(field.value) !== image) field.value = image;
    back.disabled = image <= 0;
    forth.disabled = image >= last();
  });
  return [back, h("label", {}, "Image", field), forth];
}

/** Your own image: a file, or one that is dropped on the view. @param {Page} page @param {HTMLElement} root */
export function uploadOf(page, root) {
  async function upload(own) {
    if (!own) return;
    if (own.size > UPLOAD_BYTES) return page.tell(`This file has ${(own.size / 2 ** 20).toFixed(1)} MB; at most ${UPLOAD_BYTES / 2 ** 20} MB are read.`);
    page.tell("");
    page.send({ kind: "upload", name: own.name }, await own.arrayBuffer());
  }
  const chosen = async () => {
    const own = file.files?.[0];
    file.value = ""; // the same file can be chosen again
    await upload(own);
  };
  const accept = "image/png,image/jpeg,image/webp,image/gif,image/bmp";
  const file = h("input", { type: "file", accept, "aria-label": "Your own image, from a file", hidden: "", onchange: chosen });
  const over = (event) => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    event.stopPropagation();
    root.classList.toggle("psx-over", event.type !== "drop");
    return event.type === "drop" && upload(event.dataTransfer.files[0]);
  };
  listen(root, { dragover: over, drop: over, dragleave: () => root.classList.remove("psx-over") });
  return [act("Your image…", () => file.click()), file];
}

export const shownOf = (card) => (card.uploaded ? `Your image · ${card.uploaded}` : `Image ${card.image} · ${card.label}`);

/** An order of latents in words. @param {string} name */
export const sorted = (name) => (name === "score" ? "score of its name" : name.replace("_", " "));

export const titled = (latent, name) => (latent < 0 ? "No latent chosen" : `Latent ${latent}${name ? ` · ${name}` : ""}`);

/** Names come as lines "latent<tab>name", the surest first. @param {Page} page @returns {Map<number, string>} */
function readNames(page) {
  const text = new TextDecoder().decode(bytes(page.get("names") ?? new Uint8Array()));
  const lines = text.split("\n").filter(Boolean);
  return new Map(lines.map((line) => [parseInt(line, 10), line.slice(line.indexOf("\t") + 1)]));
}

/** A latent's name, or nothing. @param {Page} page */
export function namesOf(page) {
  let names = readNames(page);
  page.on(["names"], () => (names = readNames(page)));
  return { all: () => names, of: (latent) => names.get(latent) ?? "" };
}

// Up to `most` latents whose index or name fits: the index itself, equal names, names that begin so, names that hold it.
function found(names, n_latents, asked, most) {
  const word = asked.toLowerCase();
  if (/^\d+$/.test(word)) return Number(word) < n_latents ? [Number(word)] : [];
  /** @type {number[][]} */
  const ranks = [[], [], []];
  for (const [latent, name] of word ? names : []) {
    const at = name.toLowerCase().indexOf(word);
    const bare = name.toLowerCase().replace(/ \([^)]*\)$/, "");
    if (at >= 0) ranks[bare === word ? 0 : at === 0 ? 1 : 2].push(latent);
  }
  return ranks.flat().slice(0, most);
}

/** A box that finds latents by index, by name and, where Python can, by what CLIP sees in their reference images. @param {Page} page */
export function finderOf(page, take = (latent) => page.set("latent", latent)) {
  const names = namesOf(page);
  const id = `psx-${Math.random().toString(36).slice(2)}`;
  const searches = page.get("searches");
  const ways = [...(searches ? ["words"] : []), ...(names.all().size ? ["name"] : []), "number"].join(", ");
  const said = h("span", { class: "psx-hidden", "aria-live": "polite" });
  const list = h("ul", { id, role: "listbox", "aria-label": "Latents found", hidden: "" });
  const combobox = { role: "combobox", "aria-label": `Find a latent by ${ways}`, "aria-expanded": "false", "aria-controls": id, "aria-autocomplete": "list" };
  const box = h("input", { type: "search", placeholder: ways, autocomplete: "off", spellcheck: "false", ...combobox });
  let [hits, at, asking] = [/** @type {any[]} */ ([]), 0, false];
  function open(shown) {
    list.hidden = !shown;
    box.setAttribute("aria-expanded", String(shown));
    if (!shown) box.removeAttribute("aria-activedescendant");
  }
  function mark(place) {
    at = place;
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === at)));
    if (hits.length) box.setAttribute("aria-activedescendant", `${id}-${at}`);
    list.children[at]?.scrollIntoView({ block: "nearest" });
  }
  function choose(latent) {
    take(latent);
    open(false);
    box.select();
  }
  function show() {
    const asked = box.value.trim();
    const starred = Object.entries(page.get("kept") ?? {}).filter(([, words]) => words.star);
    const named = ["*", "★"].includes(asked) ? starred.map(([latent]) => Number(latent)) : found(names.all(), page.get("n_latents"), asked, 50);
    const likely = page.get("hits")?.text === asked ? page.get("hits").latents.filter(([latent]) => !named.includes(latent)) : [];
    hits = [...named.map((latent) => [latent, ""]), ...likely.map(([latent, , score]) => [latent, `looks like it, +${score.toFixed(1)} σ`])];
    const items = hits.map(([latent, why], i) => {
      const keep = (event) => (event.preventDefault(), choose(latent)); // the box keeps the focus
      return h("li", { id: `${id}-${i}`, role: "option", onpointerdown: keep }, h("b", {}, latent), ` ${names.of(latent)} `, h("i", {}, why));
    });
    const none = h("li", { role: "option", "aria-disabled": "true" }, names.all().size ? "No latent has this name or number." : "There is no such latent.");
    list.replaceChildren(...(items.length ? items : [none]));
    said.textContent = asked ? `${hits.length || "no"} latents found` : "";
    open(Boolean(asked));
    mark(0);
  }
  // One question at a time: what was typed meanwhile is the next.
  function ask() {
    const text = box.value.trim();
    if (asking || !searches || text.length < 3 || /^\d+$/.test(text) || page.get("hits").text === text) return;
    asking = true;
    page.send({ kind: "find", text });
  }
  listen(box, {
    input: () => (show(), ask()),
    blur: () => open(false),
    keydown(event) {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") return open(false);
      if (list.hidden && (step || event.key === "Enter")) show();
      else if (step && hits.length) mark((at + step + hits.length) % hits.length);
      if (step && hits.length) event.preventDefault();
      if (event.key === "Enter" && hits.length) choose(hits[at][0]);
    },
  });
  page.on(["hits"], () => {
    asking = false;
    if (document.activeElement === box) show();
    ask();
  });
  page.on(["notice"], () => page.get("notice") && (asking = false));
  return div("psx-find", h("label", {}, "Find", box), list, said);
}

// -- lists -----------------------------------------------------------------------------------------------------------------------

/**
 * A list of { name, values, text }, with a bar for each value; or of { latent, name, values, text }: then each row is a button that chooses it.
 * @param {Page} page @param {string} heading
 * @param {{ look?: string, marks?: string[], word?: string }} [options] a class of the list; a class for each bar; what the text says
 */
export function listOf(page, heading, { look = "psx-picks", marks = [""], word = "" } = {}) {
  const title = h("h4", {}, heading);
  const list = h("ol", { class: look, "aria-label": heading });
  const empty = h("p", { class: "psx-soft" });
  const element = div("", title, list, empty);
  const latents = look !== "psx-odds";
  let [rows, most] = [/** @type {any[]} */ ([]), 1];
  const make = () => {
    /** @type {any} */
    const row = { number: h("b"), name: h("span"), text: h("i") };
    row.bars = marks.map((mark) => h("div", { class: `psx-fill ${mark}`, "aria-hidden": "true" }));
    const parts = [row.name, div("", ...row.bars), row.text];
    const choose = () => page.set("latent", row.latent);
    row.face = latents ? h("button", { class: "psx-pick", type: "button", onclick: choose }, row.number, ...parts) : div("", ...parts);
    row.element = h("li", {}, row.face);
    return row;
  };
  const fill = rowsIn(list, make, (row, { latent = -1, name, values, text }) => {
    row.latent = latent;
    row.number.textContent = latent;
    row.name.textContent = name;
    row.text.textContent = text;
    row.bars.forEach((bar, k) => {
      bar.style.setProperty("--share", String(Math.abs(values[k]) / most));
      bar.classList.toggle("psx-minus", values[k] < 0);
    });
    row.face.title = latents ? `${titled(latent, name)}, ${word} ${text}` : name;
  });
  const mark = () => rows.forEach((row) => latents && row.face.setAttribute("aria-pressed", String(row.latent === page.get("latent"))));
  page.on(["latent"], mark);
  return {
    element,
    /** Bars are drawn against the largest value, or against `scale`; `nothing` is said of an empty list. */
    show(items, { scale = Math.max(...items.flatMap((item) => item.values.map(Math.abs)), 1e-9), nothing = "", now = heading } = {}) {
      title.textContent = now;
      empty.textContent = items.length ? "" : nothing;
      element.hidden = !items.length && !nothing;
      const named = items.some((item) => item.name);
      list.classList.toggle("psx-named", named);
      most = scale;
      rows = fill(items);
      mark();
    },
  };
}

/** Rows of a list, kept and filled anew, so that the focus stays where it is. @param {HTMLElement} list */
export function rowsIn(list, make, fillIn) {
  /** @type {any[]} */
  const rows = [];
  return (items) => {
    while (rows.length > items.length) rows.pop().element.remove();
    while (rows.length < items.length) list.append(rows[rows.push(make()) - 1].element);
    rows.forEach((row, i) => fillIn(row, items[i], i));
    return rows;
  };
}

/** Images of a latent as buttons; a click chooses the image. @param {Page} page @param {string} heading @param {string} [unit] */
export function referencesOf(page, heading, unit = "mean activation") {
  const grid = h("div", { class: "psx-refs", role: "group", "aria-label": heading });
  const note = h("p", { class: "psx-soft" });
  const shelf = shelfOf(page, 6 * 10);
  let [tiles, scale] = [/** @type {any[]} */ ([]), 1];
  const keyed = (card) => card.images.map(({ index, jpeg }) => [index, jpeg]);
  const mark = () => tiles.forEach((tile) => tile.element.setAttribute("aria-pressed", String(tile.image === page.get("image"))));
  const repaint = () => tiles.forEach((tile) => paint(page, tile.canvas, SIZE.reference, tile.picture, tile.codes, scale));
  const make = () => {
    /** @type {any} */
    const tile = { canvas: h("canvas", { "aria-hidden": "true" }), name: h("b"), value: h("i") };
    const choose = () => page.set("image", tile.image);
    tile.element = h("button", { class: "psx-ref", type: "button", onclick: choose }, tile.canvas, h("span", {}, tile.name, tile.value));
    return tile;
  };
  const fillIn = rowsIn(grid, make, (tile, { index, label, value, picture, codes }) => {
    Object.assign(tile, { image: index, picture, codes });
    tile.name.textContent = label;
    tile.value.textContent = value;
    tile.element.disabled = index < -1; // not one of this view's
    tile.element.title = `${index < 0 ? label : `Image ${index}: ${label}`}, ${unit} ${value}${strongest(codes, page.get("grid"))}`;
  });
  page.on(["image"], mark);
  page.on(LOOK, repaint);
  return {
    element: div("", h("h4", {}, heading), grid, note),
    /** A card that may be shown next. */
    expect: (card) => shelf.decoded(keyed(card)),
    async show(card) {
      const pictures = await shelf.open(keyed(card));
      if (!pictures) return false; // overtaken by a later card
      [scale, note.textContent] = [card.scale, card.note];
      const parts = split(bytes(card.heats), page);
      tiles = fillIn(card.images.map((image, i) => ({ ...image, picture: pictures[i], codes: parts[i] })));
      mark();
      repaint();
      return true;
    },
  };
}

// -- how heat maps look ----------------------------------------------------------------------------------------------------------

/** Controls of the look, and a legend: colors are linear in the activation, a spotlight's brightness in its square root. @param {Page} page */
export function controls(page) {
  const opacity = h("input", { type: "range", min: 0, max: 1, step: 0.05, oninput: () => page.set("opacity", Number(opacity.value)) });
  const threshold = () => tau.value !== "" && Number(tau.value) >= 0 && page.set("tau", Number(tau.value));
  const tau = h("input", { type: "number", min: 0, step: 0.1, oninput: threshold });
  const contour = h("input", { type: "checkbox", onchange: () => page.set("contour", contour.checked) });
  page.follow(["opacity", "tau", "contour"], () => {
    opacity.value = page.get("opacity");
    contour.checked = page.get("contour");
    if (Number(tau.value) !== page.get("tau") || tau.value === "") tau.value = page.get("tau");
  });
  const scale = h("div", { "aria-hidden": "true" });
  const labels = [h("span", {}, "0"), h("span"), h("span")];
  const legend = h("div", { class: "psx-legend", role: "img" }, scale, h("p", {}, ...labels));
  page.follow(["mode", "palette"], () => {
    const stops = Array.from({ length: 16 }, (_, i) => {
      const gray = 255 * Math.sqrt(i / 15);
      const color = bytes(page.get("palette")).subarray(51 * i, 51 * i + 3);
      return `rgb(${page.get("mode") === "heat" ? color : [gray, gray, gray]})`;
    });
    scale.style.background = `linear-gradient(90deg, ${stops})`;
  });
  return {
    element: div(
      "psx-bar",
      select(page, "mode", "Show", { spotlight: "spotlight", heat: "heat map" }),
      h("label", {}, "Opacity", opacity),
      h("label", { title: "Activations up to it are not shown" }, "Threshold τ", tau),
      h("label", { title: "A line around the patches above the threshold" }, contour, "Contour"),
      legend,
    ),
    /** What the scale ends with; 0 where every latent has its own. */
    show(most) {
      labels[1].textContent = most ? short(most / 2) : "";
      labels[2].textContent = most ? `${short(most)} activation` : "its maximum";
      legend.setAttribute("aria-label", `Colors: activation from 0 to ${most ? short(most) : "the latent's maximum"}`);
    },
  };
}

/** Of a choice: { value: text } or [[value, text], ...]. */
export const options = (rows) => (Array.isArray(rows) ? rows : Object.entries(rows)).map(([value, text]) => h("option", { value }, text));

/** A box that chooses a trait. @param {Page} page */
export function select(page, trait, label, rows) {
  const parsed = typeof page.get(trait) === "number" ? Number : String;
  const box = h("select", { onchange: () => page.set(trait, parsed(box.value)) }, ...options(rows));
  page.follow([trait], () => (box.value = page.get(trait)));
  return h("label", {}, label, box);
}

// -- pictures --------------------------------------------------------------------------------------------------------------------

/** Decoded pictures by a key of theirs: the last ones are kept, and those on screen never freed. @param {Page} page */
export function shelfOf(page, limit) {
  const kept = new Map();
  let [held, latest] = [[], 0];
  const drop = (key) => {
    const close = (bitmap) => bitmap.close();
    kept.get(key).then(close, () => {}); // what could not be decoded holds nothing
    kept.delete(key);
  };
  const decoded = (images) => {
    const asked = images.map(([key, jpeg]) => {
      const picture = kept.get(key) ?? createImageBitmap(new Blob([bytes(jpeg)], { type: "image/jpeg" }));
      kept.delete(key); // the newest is the last
      kept.set(key, picture);
      return picture;
    });
    const keys = images.map(([key]) => key);
    for (const old of [...kept.keys()].slice(0, Math.max(0, kept.size - limit))) if (![...held, ...keys].includes(old)) drop(old);
    return Promise.all(asked);
  };
  page.ending(() => {
    latest = -1;
    [...kept.keys()].forEach(drop);
  });
  return {
    /** Images as [key, JPEG] to pictures. */
    decoded,
    /** The same for those that are shown next; null when a later call has overtaken this one. */
    async open(images) {
      const mine = ++latest;
      const pictures = await decoded(images);
      if (mine !== latest) return null;
      held = images.map(([key]) => key);
      return pictures;
    },
  };
}

/**
 * A picture and, over it, one byte a patch: activation = scale * (byte / 255)^2. heat.py's `overlay` is the same in Python.
 * @param {Page} page @param {HTMLCanvasElement} canvas @param {number} size @param {ImageBitmap} picture @param {Uint8Array | null} codes @param {number} scale
 */
export function paint(page, canvas, size, picture, codes, scale) {
  const side = Math.round(size * Math.min(2, globalThis.devicePixelRatio || 1));
  if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
  const context = contextOf(canvas);
  const [tau, opacity, mode, contour] = LOOK.map(page.get);
  const palette = bytes(page.get("palette"));
  context.drawImage(picture, 0, 0, side, side);
  if (!codes) return context;
  if (mode === "heat") {
    context.globalCompositeOperation = "saturation"; // gray under the colors
    context.globalAlpha = opacity;
    context.fillRect(0, 0, side, side);
    context.globalCompositeOperation = "source-over";
    context.globalAlpha = 1;
  }
  const [rows, columns] = page.get("grid");
  const image = new ImageData(columns, rows);
  const shown = (patch) => scale * (codes[patch] / 255) ** 2 > tau;
  for (let i = 0; i < codes.length; i++) {
    const root = codes[i] / 255;
    if (mode === "heat") {
      const color = 3 * Math.round(255 * root * root);
      image.data.set(palette.subarray(color, color + 3), 4 * i);
      image.data[4 * i + 3] = shown(i) ? Math.round(255 * opacity * root) : 0;
    } else image.data[4 * i + 3] = Math.round(255 * opacity * (shown(i) ? 1 - root : 1));
  }
  const layer = (paint.layer ??= h("canvas"));
  [layer.width, layer.height] = [columns, rows];
  contextOf(layer).putImageData(image, 0, 0);
  context.drawImage(layer, 0, 0, side, side);
  if (contour) border(context, shown, [rows, columns]);
  return context;
}
/** @type {HTMLCanvasElement | undefined} */
paint.layer = undefined;

/** The edge of a set of patches: white over black shows on any picture. @param {(patch: number) => boolean} inside */
export function border(context, inside, [rows, columns], thickness = 2) {
  const [width, height] = [context.canvas.width / columns, context.canvas.height / rows];
  const line = (x, y, right, down) => (context.moveTo(x, y), context.lineTo(x + right, y + down));
  context.beginPath();
  for (let patch = 0; patch < rows * columns; patch++) {
    if (!inside(patch)) continue;
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const [x, y] = [column * width, row * height];
    if (row === 0 || !inside(patch - columns)) line(x, y, width, 0);
    if (row === rows - 1 || !inside(patch + columns)) line(x, y + height, width, 0);
    if (column === 0 || !inside(patch - 1)) line(x, y, 0, height);
    if (column === columns - 1 || !inside(patch + 1)) line(x + width, y, 0, height);
  }
  const stroke = (color, width) => {
    context.strokeStyle = color;
    context.lineWidth = width * Math.max(0.5, context.canvas.width / SIZE.stage);
    context.stroke();
  };
  stroke("#1a1a1a", thickness + 2);
  stroke("#ffffff", thickness);
}

// -- choosing patches ------------------------------------------------------------------------------------------------------------

export const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export const placeOf = (patch, columns) => `Row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;

export function strongest(codes, [, columns]) {
  const at = codes.reduce((best, code, i) => (code > codes[best] ? i : best), 0);
  return codes[at] ? `, strongest at ${placeOf(at, columns).toLowerCase()}` : "";
}

/** Heat maps that came as one run of bytes. @param {Uint8Array} codes @param {Page} page */
export function split(codes, page) {
  const size = page.get("grid")[0] * page.get("grid")[1];
  return Array.from({ length: codes.length / size }, (_, i) => codes.subarray(i * size, (i + 1) * size));
}

/**
 * A picture whose patches pointer and keys choose: each click or drag takes several where `several`, elsewhere with Shift, Control or Command.
 * `heat()` is what lies over the picture, and its scale; `choose(patches, last)` and `pointed()` are called.
 * @param {Page} page
 * @param {{ heat: () => any[], choose: (patches: number[], last: number) => void, chosen?: () => number[], several?: boolean, hint?: string,
 *   title?: HTMLElement, pointed?: () => void }} view
 */
export function stageOf(page, { heat, choose, chosen = () => page.get("patches"), several = false, hint = "", title = h("h3"), pointed = () => {} }) {
  const grid = page.get("grid");
  const [rows, columns] = grid;
  const canvas = h("canvas", { class: "psx-stage", tabindex: 0, role: "application", "aria-roledescription": "grid of patches" });
  const live = h("p", { class: "psx-hidden", "aria-live": "polite" });
  const shelf = shelfOf(page, 1);
  let picture = null;
  let [cursor, under] = [-1, -1]; // patches: that which keys move, and under the pointer
  let dragged = null; // patches that a drag has chosen, while it lasts
  const turned = (patches, patch, on) => [...patches.filter((one) => one !== patch), ...(on ? [patch] : [])].sort((a, b) => a - b);
  const many = (event) => several || event.shiftKey || event.ctrlKey || event.metaKey;

  function draw() {
    if (!picture) return;
    const [codes, scale] = heat();
    const context = paint(page, canvas, SIZE.stage, picture, codes, scale);
    const inside = new Set(dragged?.patches ?? chosen());
    const focus = document.activeElement === canvas && several ? cursor : under;
    if (focus >= 0 && !inside.has(focus)) border(context, (patch) => patch === focus, grid, 1);
    border(context, (patch) => inside.has(patch), grid, 3);
  }
  function pick(patch, on) {
    cursor = patch;
    choose(turned(chosen(), patch, on), patch);
  }
  function patchAt(event) {
    const box = canvas.getBoundingClientRect();
    const within = (share, n) => Math.min(n - 1, Math.max(0, Math.floor(share * n)));
    return within((event.clientY - box.top) / box.height, rows) * columns + within((event.clientX - box.left) / box.width, columns);
  }
  function move(patch) {
    if (patch === under) return;
    under = patch;
    if (dragged && patch >= 0) dragged.patches = turned(dragged.patches, patch, dragged.adds);
    pointed();
    draw();
  }
  const stop = (event) => {
    const patches = dragged?.patches;
    dragged = null;
    if (patches && event.type === "pointerup") choose(patches, (cursor = under));
    draw();
  };
  listen(canvas, {
    click: (event) => many(event) || choose([(cursor = patchAt(event))], cursor),
    pointerdown(event) {
      if (!many(event)) return;
      under = patchAt(event);
      const adds = !chosen().includes(under);
      dragged = { adds, patches: turned(chosen(), under, adds) };
      canvas.setPointerCapture(event.pointerId);
      draw();
    },
    pointermove: (event) => move(patchAt(event)),
    pointerleave: () => move(-1),
    pointerup: stop,
    pointercancel: stop,
    focus: draw,
    blur: draw,
    keydown(event) {
      const step = ARROWS[event.key];
      if (!step && ![" ", "Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      if (event.key === "Escape") return choose([], -1);
      if (cursor < 0) cursor = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
      else if (step) {
        const at = (place, by, n) => Math.min(n - 1, Math.max(0, place + by));
        cursor = at(Math.floor(cursor / columns), step[0], rows) * columns + at(cursor % columns, step[1], columns);
      }
      if (!step) pick(cursor, !chosen().includes(cursor));
      else if (event.shiftKey) pick(cursor, true);
      else if (!several) choose([cursor], cursor);
      live.textContent = `${placeOf(cursor, columns)}, ${chosen().includes(cursor) ? "selected" : "not selected"}`;
      draw();
    },
  });
  page.on(["patch", "patches", ...LOOK], draw);
  const follow = () => document.activeElement === canvas || (cursor = page.get("patch")); // while keys move it, answers are late
  if (!several) page.follow(["patch"], follow);
  return {
    element: div("", title, canvas, ...(hint ? [h("p", { class: "psx-status" }, hint)] : []), live),
    draw,
    say: (text) => (live.textContent = text),
    under: () => under,
    /** Whether it is shown: false when a later card has overtaken it. */
    async show(card, heading) {
      const opened = await shelf.open([[card.jpeg, card.jpeg]]);
      if (opened) [[picture], title.textContent] = [opened, heading];
      return Boolean(opened);
    },
    label: (text) => canvas.setAttribute("aria-label", `${text} Arrow keys move over ${rows} by ${columns} patches.`),
  };
}

// -- small things ----------------------------------------------------------------------------------------------------------------

export const bytes = (view) => (view instanceof Uint8Array ? view : new Uint8Array(view.buffer, view.byteOffset, view.byteLength));

/** Numbers out of bytes that may begin anywhere. */
export const words = (view, Kind) => new Kind(bytes(view).slice().buffer);

export const three = (value) => String(Number(value.toPrecision(3)));
export const short = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(2));
export const signed = (value) => `${value < 0 ? "−" : "+"}${short(Math.abs(value))}`;

export const contextOf = (canvas) => /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));

/** Gives a canvas's memory back at once. @param {HTMLCanvasElement} canvas */
export const free = (canvas) => void (canvas.width = canvas.height = 0);

/** A part of a view, with a class of the style sheet. @param {string} look @param {...(Node | string)} children */
export const div = (look, ...children) => h("div", { class: look }, ...children);

/** A button. @param {string} label @param {(event: any) => any} onclick */
export const act = (label, onclick, more = {}) => h("button", { class: "psx-step", type: "button", onclick, ...more }, label);

/** Calls on an element's events; what fails there, now or in a promise, is told in the page. */
export function listen(element, calls) {
  const tell = (error) => element.dispatchEvent(new CustomEvent("psx-error", { bubbles: true, detail: error }));
  for (const [name, call] of Object.entries(calls)) element.addEventListener(name, (event) => attempt(() => call(event), tell));
}

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} [attributes] those that begin with "on" are calls on events
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) listen(element, { [name.slice(2)]: value });
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
