// What all explorers share. Python sends a card (facts, JPEG bytes, one byte a patch); the page draws it.
// Each view is a module that imports this one; module() in widgets.py makes one file of the two. Texts are set as text nodes only, never as HTML.

export const LOOK = ["tau", "opacity", "mode", "contour"]; // how heat maps look
const UPLOAD_BYTES = 8 * 2 ** 20; // as in reader.py
export const SIZE = { reference: 160, stage: 448 };

// An anywidget module that shows one view: `view(page, root)` fills the root and returns what ends it.
export function widget(view) {
  return {
    render({ model, el }) {
      const stops = [];
      const notice = h("p", { class: "psx-notice", role: "alert" });
      const page = {
        model,
        get: (name) => model.get(name),
        // One choice, or several at once: set({ name: value, ... }).
        set(name, value) {
          for (const [key, chosen] of Object.entries(typeof name === "string" ? { [name]: value } : name)) model.set(key, chosen);
          model.save_changes();
        },
        // A message that is no state: a wish, or a file.
        send: (content, ...buffers) => model.send?.(content, undefined, buffers),
        on(names, call) {
          const safe = () => page.run(call);
          for (const name of names) {
            model.on(`change:${name}`, safe);
            stops.push(() => model.off(`change:${name}`, safe));
          }
        },
        // Whatever fails, now or in a promise, is told in the page.
        async run(call) {
          try {
            await call();
          } catch (error) {
            console.error(error);
            page.tell(`This view could not be drawn: ${error.message ?? error}`);
          }
        },
        tell(text) {
          notice.textContent = text;
          notice.hidden = !text;
        },
      };
      // Jupyter leaves keys alone inside such an element.
      const root = h("section", { class: `psx psx-${page.get("kind")}`, "data-lm-suppress-shortcuts": "true" }, notice);
      page.on(["notice"], () => page.tell(page.get("notice")));
      page.tell(page.get("notice") ?? "");
      el.append(root);
      page.run(() => {
        stops.push(view(page, root));
        root.append(sharing(page));
        const wish = wished()[page.get("kind")];
        if (wish) page.send({ kind: "open", selection: wish });
      });
      return () => {
        if (views.get(page.get("kind")) === page) views.delete(page.get("kind"));
        stops.forEach((stop) => stop());
        root.remove();
      };
    },
  };
}

// What a link holds: the choices of all views of the page, behind "#psx=".
const views = (globalThis.psxViews ??= new Map());

function wished() {
  try {
    return JSON.parse(decodeURIComponent(location.hash.replace("#psx=", ""))) ?? {};
  } catch {
    return {}; // no link of ours
  }
}

// Buttons that copy a line of Python, and a link, that open what is shown.
function sharing(page) {
  views.set(page.get("kind"), page);
  const chosen = (view) => view.get("choices").map((name) => [name, view.get(name)]);
  const python = () => `${page.get("call")}, ${chosen(page).map(([name, value]) => `${name}=${JSON.stringify(value)}`).join(", ")})`;
  const link = () => {
    const all = Object.fromEntries([...views].map(([kind, view]) => [kind, Object.fromEntries(chosen(view))]));
    return `${location.href.split("#")[0]}#psx=${encodeURIComponent(JSON.stringify(all))}`;
  };
  const buttons = [copier(page, "Copy as Python", python)];
  if (!globalThis.jupyterapp) buttons.push(copier(page, "Copy link", link)); // JupyterLab takes an address's end for its own
  const save = (format) => h("button", { class: "psx-step", type: "button", onclick: () => page.send({ kind: "export", format }) }, `Save as ${format.toUpperCase()}`);
  page.on(["exported"], () => {
    const file = page.get("exported");
    if (!file.name) return;
    const href = URL.createObjectURL(new Blob([bytes(file.bytes)]));
    h("a", { href, download: file.name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  });
  return h("div", { class: "psx-bar psx-sharing" }, ...buttons, save("png"), save("svg"));
}

// A button that copies a text; without leave to write to the clipboard the text is told in the page.
export function copier(page, label, text) {
  const copy = () =>
    page.run(async () => {
      try {
        await navigator.clipboard.writeText(text());
        button.textContent = "Copied";
        setTimeout(() => (button.textContent = label), 1500);
      } catch {
        page.tell(text());
      }
    });
  const button = h("button", { class: "psx-step", type: "button", onclick: copy }, label);
  return button;
}

// Images of a latent as buttons; a click chooses the image.
export function referencesOf(page, heading, unit = "mean activation") {
  const grid = h("div", { class: "psx-refs", role: "group", "aria-label": heading });
  const note = h("p", { class: "psx-soft" });
  const shelf = shelfOf(6 * 10);
  let [tiles, scale, latest] = [[], 1, 0];
  const opened = (card) => Promise.all(card.images.map(({ index, jpeg }) => shelf.picture(index, jpeg)));
  const mark = () => tiles.forEach((tile) => tile.element.setAttribute("aria-pressed", tile.image === page.get("image")));
  const repaint = () => tiles.forEach((tile) => paint(tile.canvas, SIZE.reference, tile.picture, tile.codes, lookOf(page, scale)));
  const fillTiles = rowsIn(
    grid,
    () => {
      const tile = { canvas: h("canvas", { "aria-hidden": "true" }), name: h("b"), value: h("i") };
      const choose = () => page.set("image", tile.image);
      tile.element = h("button", { class: "psx-ref", type: "button", onclick: choose }, tile.canvas, h("span", {}, tile.name, tile.value));
      return tile;
    },
    (tile, { index, label, value, picture, codes }, i) => {
      Object.assign(tile, { image: index, picture, codes });
      tile.name.textContent = label;
      tile.value.textContent = value;
      tile.element.disabled = index < -1; // not one of this view's
      tile.element.title = index < 0 ? label : `Image ${index}: ${label}`;
      tile.element.setAttribute("aria-label", `${heading}, ${i + 1}: ${tile.element.title}, ${unit} ${value}${strongest(codes, page.get("grid"))}`);
    },
  );
  page.on(["image"], mark);
  page.on(LOOK, repaint);
  return {
    element: h("div", {}, h("h4", {}, heading), grid, note),
    expect: opened, // a card that may be shown next
    async show(next) {
      const mine = ++latest;
      const pictures = await opened(next);
      if (mine !== latest) return false; // overtaken by a later card
      shelf.hold(next.images.map((image) => image.index));
      scale = next.scale;
      note.textContent = next.note;
      const codes = bytes(next.heats);
      const step = codes.length / Math.max(1, next.images.length);
      tiles = fillTiles(next.images.map((image, i) => ({ ...image, picture: pictures[i], codes: codes.subarray(i * step, (i + 1) * step) })));
      mark();
      repaint();
      return true;
    },
    close() {
      latest++;
      shelf.close();
      for (const { canvas } of tiles) canvas.width = canvas.height = 0; // frees their memory at once
    },
  };
}

// -- choosing an image, and bars ------------------------------------------------------------------------------------------------

// A field for an image's index, which takes back what is none, between buttons for the images beside it.
export function imageSteps(page) {
  const choose = (image) => page.set(page.get("uploaded") ? { image, uploaded: "" } : { image });
  const last = () => page.get("n_images") - 1;
  const field = h("input", { type: "number", min: 0, step: 1, "aria-label": "Image, by its index" });
  field.addEventListener("change", () => {
    const image = Number(field.value);
    if (field.value !== "" && Number.isInteger(image) && image >= 0 && image <= last()) choose(image);
    else field.value = page.get("image");
  });
  const turn = (step) => choose(Math.min(last(), Math.max(0, page.get("image") + step)));
  const back = h("button", { class: "psx-step", type: "button", "aria-label": "Previous image", onclick: () => turn(-1) }, "‹");
  const forth = h("button", { class: "psx-step", type: "button", "aria-label": "Next image", onclick: () => turn(1) }, "›");
  const show = (image) => {
    field.max = last();
    if (document.activeElement !== field || Number(field.value) !== image) field.value = image;
    back.disabled = image <= 0;
    forth.disabled = image >= last();
  };
  return { elements: [back, h("label", {}, "Image", field), forth], show };
}

// Buttons for a picture of one's own: a file, or one that is dropped on the view.
export function uploadOf(page, root) {
  const file = h("input", { type: "file", accept: "image/png,image/jpeg,image/webp,image/gif,image/bmp", "aria-label": "Your own image, from a file" });
  const open = h("button", { class: "psx-step", type: "button", onclick: () => file.click() }, "Your image…");
  file.hidden = true;
  async function upload(chosen) {
    if (!chosen) return;
    if (chosen.size > UPLOAD_BYTES) return page.tell(`This file has ${(chosen.size / 2 ** 20).toFixed(1)} MB; at most ${UPLOAD_BYTES / 2 ** 20} MB are read.`);
    page.tell("");
    page.send({ kind: "upload", name: chosen.name }, await chosen.arrayBuffer());
  }
  file.addEventListener("change", () => {
    const own = file.files[0];
    page.run(() => upload(own));
    file.value = ""; // the same file can be chosen again
  });
  const over = (event) => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    event.stopPropagation();
    root.classList.toggle("psx-over", event.type !== "drop");
    if (event.type !== "drop") return;
    const own = event.dataTransfer.files[0];
    page.run(() => upload(own));
  };
  root.addEventListener("dragover", over);
  root.addEventListener("drop", over);
  root.addEventListener("dragleave", () => root.classList.remove("psx-over"));
  return [open, file];
}

export const shownOf = (card) => (card.uploaded ? `Your image · ${card.uploaded}` : `Image ${card.image} · ${card.label}`);

// A name, a bar for each mark (a class of the style sheet), and a text: rows [name, value, ...].
export function barsOf(list, marks, text) {
  let most = 1;
  const show = rowsIn(
    list,
    () => {
      const row = { name: h("b"), bars: marks.map((mark) => h("div", { class: `psx-fill ${mark}`, "aria-hidden": "true" })), values: h("i") };
      row.element = h("li", {}, row.name, h("div", {}, ...row.bars), row.values);
      return row;
    },
    (row, [name, ...values]) => {
      row.name.textContent = row.name.title = name;
      row.bars.forEach((bar, k) => fillBar(bar, values[k], most));
      row.values.textContent = text(...values);
    },
  );
  return (rows, scale = 1) => ((most = scale), show(rows));
}

// Latents as small buttons with a number each: rows [latent, name, value].
export function chipsOf(page, heading, word) {
  const list = h("ol", { class: "psx-near", "aria-label": heading });
  const element = h("div", {}, h("h4", {}, heading), list);
  const show = rowsIn(
    list,
    () => {
      const row = { number: h("b"), name: h("span"), value: h("i") };
      row.button = h("button", { class: "psx-chip", type: "button", onclick: () => page.set("latent", row.latent) }, row.number, row.name, row.value);
      row.element = h("li", {}, row.button);
      return row;
    },
    (row, [latent, name, value]) => {
      row.latent = row.number.textContent = latent;
      row.name.textContent = name;
      row.value.textContent = value.toFixed(2);
      row.button.setAttribute("aria-label", `${titled(latent, name)}, ${word} ${value.toFixed(2)}`);
    },
  );
  return { element, show: (latents) => ((element.hidden = !latents.length), show(latents)) };
}

// -- the grid of patches -------------------------------------------------------------------------------------------------------

// The path's line: white over black shows on any picture.
function ink(context, thickness, scale) {
  for (const [color, extra] of [["#1a1a1a", 2], ["#ffffff", 0]]) {
    context.strokeStyle = color;
    context.lineWidth = (thickness + extra) * scale;
    context.stroke();
  }
}

export function outline(context, patch, [width, height], columns, thickness) {
  if (patch < 0) return;
  context.beginPath();
  context.rect((patch % columns) * width, Math.floor(patch / columns) * height, width, height);
  ink(context, thickness, context.canvas.width / SIZE.stage);
}

// The edge of a set of patches, given as patch -> whether it is inside.
export function border(context, inside, [rows, columns], thickness = 2) {
  const [width, height] = [context.canvas.width / columns, context.canvas.height / rows];
  context.beginPath();
  for (let patch = 0; patch < rows * columns; patch++) {
    if (!inside(patch)) continue;
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const [x, y] = [column * width, row * height];
    const line = (...ends) => (context.moveTo(...ends.slice(0, 2)), context.lineTo(...ends.slice(2)));
    if (row === 0 || !inside(patch - columns)) line(x, y, x + width, y);
    if (row === rows - 1 || !inside(patch + columns)) line(x, y + height, x + width, y + height);
    if (column === 0 || !inside(patch - 1)) line(x, y, x, y + height);
    if (column === columns - 1 || !inside(patch + 1)) line(x + width, y, x + width, y + height);
  }
  ink(context, thickness, Math.max(0.5, context.canvas.width / SIZE.stage));
}

export function patchAt(event, canvas, [rows, columns]) {
  const box = canvas.getBoundingClientRect();
  const within = (share, n) => Math.min(n - 1, Math.max(0, Math.floor(share * n)));
  return within((event.clientY - box.top) / box.height, rows) * columns + within((event.clientX - box.left) / box.width, columns);
}

export const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export function stepped(patch, [down, right], [rows, columns]) {
  const row = Math.min(rows - 1, Math.max(0, Math.floor(patch / columns) + down));
  return row * columns + Math.min(columns - 1, Math.max(0, (patch % columns) + right));
}

export const placeOf = (patch, columns) => `Row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;

// -- names and lists -----------------------------------------------------------------------------------------------------------

// Names come once, as lines "latent<tab>name", the surest first.
export function namesOf(page) {
  const text = new TextDecoder().decode(bytes(page.get("names") ?? new Uint8Array()));
  return new Map(text.split("\n").filter(Boolean).map((line) => [parseInt(line, 10), line.slice(line.indexOf("\t") + 1)]));
}

export const titled = (latent, name) => (latent < 0 ? "No latent chosen" : `Latent ${latent}${name ? ` · ${name}` : ""}`);

// Up to `most` latents whose index or name fits: the index itself, equal names, names that begin so, names that hold it.
function found(names, n_latents, asked, most) {
  const word = asked.trim().toLowerCase();
  if (!word) return [];
  if (/^\d+$/.test(word)) return Number(word) < n_latents ? [Number(word)] : [];
  const ranks = [[], [], []];
  for (const [latent, name] of names) {
    const at = name.toLowerCase().indexOf(word);
    if (at < 0) continue;
    const bare = name.toLowerCase().replace(/ \([^)]*\)$/, "");
    ranks[bare === word ? 0 : at === 0 ? 1 : 2].push(latent);
  }
  return ranks.flat().slice(0, most);
}

// A box that finds latents by index, by name and, where Python can, by what CLIP sees in their reference images; with a list to choose from.
export function finderOf(page, take = (latent) => page.set("latent", latent)) {
  let names = namesOf(page);
  page.on(["names"], () => (names = namesOf(page)));
  const id = `psx-${Math.random().toString(36).slice(2)}`;
  const searches = page.get("searches");
  const ways = ["number", ...(names.size ? ["name"] : []), ...(searches ? ["words"] : [])].reverse().join(", ");
  const box = h("input", {
    type: "search", role: "combobox", placeholder: ways, autocomplete: "off", spellcheck: "false",
    "aria-label": `Find a latent by ${ways}`, "aria-expanded": "false", "aria-controls": id, "aria-autocomplete": "list",
  });
  const list = h("ul", { id, role: "listbox", "aria-label": "Latents found" });
  const said = h("span", { class: "psx-hidden", "aria-live": "polite" });
  list.hidden = true;
  let [hits, at, asking] = [[], 0, false];
  function close() {
    list.hidden = true;
    box.setAttribute("aria-expanded", "false");
    box.removeAttribute("aria-activedescendant");
  }
  function mark(place) {
    at = place;
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", i === at));
    if (hits.length) box.setAttribute("aria-activedescendant", `${id}-${at}`);
    list.children[at]?.scrollIntoView({ block: "nearest" });
  }
  function show() {
    const asked = box.value.trim();
    const starred = Object.entries(page.get("kept") ?? {}).filter(([, words]) => words.star);
    const named = ["*", "★"].includes(asked) ? starred.map(([latent]) => Number(latent)) : found(names, page.get("n_latents"), asked, 50);
    const likely = page.get("hits")?.text === asked ? page.get("hits").latents.filter(([latent]) => !named.includes(latent)) : [];
    const like = likely.map(([latent, , score]) => [latent, `looks like it, +${score.toFixed(1)} σ`]);
    hits = [...named.map((latent) => [latent, ""]), ...like];
    list.replaceChildren(
      ...hits.map(([latent, why], i) => {
        const item = h("li", { id: `${id}-${i}`, role: "option" }, h("b", {}, latent), ` ${names.get(latent) ?? ""} `, h("i", {}, why));
        item.addEventListener("pointerdown", (event) => {
          event.preventDefault(); // the box keeps the focus
          choose(latent);
        });
        return item;
      }),
      ...(asked && !hits.length ? [h("li", { class: "psx-soft" }, names.size ? "No latent has this name or number." : "There is no such latent.")] : []),
    );
    said.textContent = asked ? `${hits.length || "no"} latents found` : "";
    list.hidden = !asked;
    box.setAttribute("aria-expanded", String(Boolean(asked)));
    mark(0);
  }
  function choose(latent) {
    take(latent);
    close();
    box.select();
  }
  // One question at a time: what was typed meanwhile is the next.
  function ask() {
    const text = box.value.trim();
    if (asking || !searches || text.length < 3 || /^\d+$/.test(text) || page.get("hits").text === text) return;
    asking = true;
    page.send({ kind: "find", text });
  }
  box.addEventListener("input", () => (show(), ask()));
  page.on(["hits"], () => {
    asking = false;
    if (document.activeElement === box) show();
    ask();
  });
  page.on(["notice"], () => page.get("notice") && (asking = false));
  box.addEventListener("blur", close);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return close();
    if (event.key === "Enter") {
      if (list.hidden) show();
      if (hits.length) choose(hits[at][0]);
      return;
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !hits.length) return;
    event.preventDefault();
    if (list.hidden) show();
    else mark((at + step + hits.length) % hits.length);
  });
  return { element: h("div", { class: "psx-find" }, h("label", {}, "Find", box), list, said), nameOf: (latent) => names.get(latent) ?? "" };
}

// Latents as buttons, each with a bar; values below zero are marked.
export function listOf(page, heading) {
  const list = h("ol", { "aria-label": `Latents: ${heading.toLowerCase()}` });
  const empty = h("p", { class: "psx-soft" });
  const title = h("h4", {}, heading);
  let [rows, most] = [[], 1];
  const fillRows = rowsIn(
    list,
    () => {
      const row = { number: h("b"), name: h("span"), bar: h("div", { class: "psx-fill", "aria-hidden": "true" }), value: h("i") };
      row.button = h("button", { class: "psx-pick", type: "button", onclick: () => page.set("latent", row.latent) }, row.number, h("div", {}, row.name, row.bar), row.value);
      row.element = h("li", {}, row.button);
      return row;
    },
    (row, { latent, name, value, text }) => {
      row.latent = row.number.textContent = latent;
      row.name.textContent = row.name.title = name;
      fillBar(row.bar, value, most);
      row.value.textContent = text;
      row.button.setAttribute("aria-label", `${titled(latent, name)}: ${text}`);
    },
  );
  return {
    element: h("div", {}, title, list, empty),
    show(latents, nothing, now = heading) {
      title.textContent = now;
      empty.textContent = latents.length ? "" : nothing;
      list.classList.toggle("psx-named", latents.some((l) => l.name));
      most = Math.max(...latents.map((l) => Math.abs(l.value)), 1e-9);
      rows = fillRows(latents);
      this.mark(page.get("latent"));
    },
    mark: (latent) => rows.forEach((row) => row.button.setAttribute("aria-pressed", row.latent === latent)),
  };
}

// -- controls ------------------------------------------------------------------------------------------------------------------

export function controls(page) {
  const opacity = h("input", { type: "range", min: 0, max: 1, step: 0.05 });
  const tau = h("input", { type: "number", min: 0, step: 0.1 });
  const show = () => {
    opacity.value = page.get("opacity");
    contour.checked = page.get("contour");
    if (Number(tau.value) !== page.get("tau") || tau.value === "") tau.value = page.get("tau");
  };
  opacity.addEventListener("input", () => page.set("opacity", Number(opacity.value)));
  tau.addEventListener("input", () => tau.value !== "" && Number(tau.value) >= 0 && page.set("tau", Number(tau.value)));
  const contour = h("input", { type: "checkbox", onchange: () => page.set("contour", contour.checked) });
  page.on(["opacity", "tau", "contour"], show);
  show();
  return [select(page, "mode", "Show", { spotlight: "spotlight", heat: "heat map" }), h("label", {}, "Opacity", opacity), h("label", { title: "Activations up to it are not shown" }, "Threshold τ", tau), h("label", { title: "A line around the patches above the threshold" }, contour, "Contour")];
}

export function select(page, trait, label, options) {
  const parsed = typeof page.get(trait) === "number" ? Number : String;
  const box = h("select", { onchange: () => page.set(trait, parsed(box.value)) }, ...(Array.isArray(options) ? options : Object.entries(options)).map(([value, text]) => h("option", { value }, text)));
  const show = () => (box.value = page.get(trait));
  page.on([trait], show);
  show();
  return h("label", {}, label, box);
}

// Colors are linear in the activation, a spotlight's brightness in its square root.
export function legendOf(page) {
  const bar = h("div", { "aria-hidden": "true" });
  const labels = [h("span", {}, "0"), h("span"), h("span")];
  const element = h("div", { class: "psx-legend" }, bar, h("p", {}, ...labels));
  const color = () => {
    const colors = bytes(page.get("palette"));
    const stop = (i) => {
      const gray = 255 * Math.sqrt(i / 255);
      return `rgb(${page.get("mode") === "heat" ? Array.from(colors.subarray(3 * i, 3 * i + 3)) : [gray, gray, gray]})`;
    };
    bar.style.background = `linear-gradient(90deg, ${Array.from({ length: 16 }, (_, i) => stop(17 * i))})`;
  };
  page.on(["mode", "palette"], color);
  color();
  return {
    element,
    // Where every latent has a scale of its own.
    relative() {
      element.setAttribute("aria-label", "Colors: activation from 0 to the latent's maximum");
      labels[2].textContent = "its maximum";
    },
    show(scale) {
      element.setAttribute("aria-label", `Colors: activation from 0 to ${short(scale)}`);
      labels[1].textContent = short(scale / 2);
      labels[2].textContent = `${short(scale)} activation`;
    },
  };
}

// -- drawing -------------------------------------------------------------------------------------------------------------------

export function lookOf(page, scale) {
  return { scale, grid: page.get("grid"), palette: bytes(page.get("palette")), ...Object.fromEntries(LOOK.map((name) => [name, page.get(name)])) };
}

// A picture and, over it, one byte a patch: activation = scale * (byte / 255)^2. heat.py's `overlay` is the same in Python.
export function paint(canvas, size, picture, codes, look) {
  const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
  const side = Math.round(size * ratio);
  if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.drawImage(picture.color, 0, 0, side, side);
  if (!codes) return;
  if (look.mode === "heat") {
    context.globalAlpha = look.opacity;
    context.drawImage(picture.gray, 0, 0, side, side);
    context.globalAlpha = 1;
  }
  const [rows, columns] = look.grid;
  const layer = (paint.layer ??= document.createElement("canvas"));
  layer.width = columns;
  layer.height = rows;
  const pixels = layer.getContext("2d", { willReadFrequently: true });
  const image = pixels.createImageData(columns, rows);
  for (let i = 0; i < codes.length; i++) {
    const root = codes[i] / 255;
    const shown = look.scale * root * root > look.tau;
    if (look.mode === "heat") {
      const color = 3 * Math.round(255 * root * root);
      image.data.set(look.palette.subarray(color, color + 3), 4 * i);
      image.data[4 * i + 3] = shown ? Math.round(255 * look.opacity * root) : 0;
    } else {
      image.data[4 * i + 3] = Math.round(255 * look.opacity * (shown ? 1 - root : 1));
    }
  }
  pixels.putImageData(image, 0, 0);
  context.drawImage(layer, 0, 0, side, side);
  if (look.contour) border(context, (patch) => look.scale * (codes[patch] / 255) ** 2 > look.tau, look.grid);
}

export function strongest(codes, [, columns]) {
  const at = codes.reduce((best, code, i) => (code > codes[best] ? i : best), 0);
  return codes[at] ? `, strongest at row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}` : "";
}

export function fit(canvas) {
  const ratio = globalThis.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
  return { width, height };
}

// -- small things --------------------------------------------------------------------------------------------------------------

// JPEG bytes to a picture, in color and in gray; null when a later call has overtaken this one. The last bitmap is freed when a new one comes.
export function decoding() {
  let [latest, current] = [0, null];
  const decode = async (jpeg) => {
    const mine = ++latest;
    const bitmap = await bitmapOf(jpeg);
    (mine === latest ? current : bitmap)?.close();
    if (mine !== latest) return null;
    current = bitmap;
    return pictureOf(bitmap);
  };
  decode.close = () => (latest++, current?.close(), (current = null));
  return decode;
}

// Decoded pictures of a data set by their index; the last ones are kept, and those on screen never freed.
function shelfOf(limit) {
  const kept = new Map();
  let held = [];
  const free = (index) => {
    kept.get(index).then(({ color }) => color.close(), () => {}); // what could not be decoded holds nothing
    kept.delete(index);
  };
  return {
    picture(index, jpeg) {
      const picture = kept.get(index) ?? bitmapOf(jpeg).then(pictureOf);
      kept.delete(index); // the newest is the last
      kept.set(index, picture);
      for (const old of [...kept.keys()].slice(0, Math.max(0, kept.size - limit))) if (!held.includes(old)) free(old);
      return picture;
    },
    hold: (indices) => (held = indices),
    close: () => [...kept.keys()].forEach(free),
  };
}

const bitmapOf = (jpeg) => createImageBitmap(new Blob([bytes(jpeg)], { type: "image/jpeg" }));

// A picture, and its gray twin when a heat map first needs it.
export function pictureOf(color) {
  let gray = null;
  return { color, get gray() { return (gray ??= grayOf(color)); } };
}

function grayOf(bitmap) {
  const canvas = h("canvas", { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const image = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let i = 0; i < image.data.length; i += 4) {
    image.data.fill(0.299 * image.data[i] + 0.587 * image.data[i + 1] + 0.114 * image.data[i + 2], i, i + 3);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

export const bytes = (view) => (view instanceof Uint8Array ? view : new Uint8Array(view.buffer, view.byteOffset, view.byteLength));

// Numbers out of bytes that may begin anywhere.
export const words = (view, Kind) => new Kind(bytes(view).slice().buffer);

export const three = (value) => String(Number(value.toPrecision(3)));
export const short = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(2));

export function fillBar(bar, value, most = 1) {
  bar.style.setProperty("--share", Math.abs(value) / most);
  bar.classList.toggle("psx-minus", value < 0);
}

// Rows of a list, kept and filled anew, so that the focus stays where it is.
export function rowsIn(list, make, fillIn) {
  const rows = [];
  return (items) => {
    while (rows.length > items.length) rows.pop().element.remove();
    while (rows.length < items.length) list.append(rows[rows.push(make()) - 1].element);
    rows.forEach((row, i) => fillIn(row, items[i], i));
    return rows;
  };
}

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
