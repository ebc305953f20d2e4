/** What the page itself knows: where one is, light or dark, what was just said. */

export type Theme = "auto" | "light" | "dark";

export type Place =
  | { name: "home" }
  | { name: "film"; id: string }
  | { name: "compare"; first: string; second: string };

const STYLES: readonly Theme[] = ["auto", "light", "dark"];

function stored(name: string): string | null {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function store(name: string, value: string): void {
  try {
    localStorage.setItem(name, value);
  } catch {
    // a browser that keeps nothing still works
  }
}

function read(): Place {
  const parts = location.hash.replace(/^#\/?/, "").split("/");
  const known = (id: string | undefined): id is string => /^[a-z]+_[0-9a-z]+$/.test(id ?? "");
  if (parts[0] === "film" && known(parts[1])) return { name: "film", id: parts[1] };
  if (parts[0] === "compare" && known(parts[1]) && known(parts[2])) {
    return { name: "compare", first: parts[1], second: parts[2] };
  }
  return { name: "home" };
}

class PageState {
  place = $state.raw<Place>(read());
  theme = $state<Theme>((STYLES as readonly string[]).includes(stored("theme") ?? "") ? (stored("theme") as Theme) : "auto");
  shortcuts = $state(stored("shortcuts") !== "off");
  /** Whether the sheet of shortcuts is open. */
  sheet = $state(false);
  /** Whether the server asked for a key. */
  locked = $state(false);
  /** Whether a key was given. */
  keyed = $state(false);
  /** Whether the page of keys and limits is open. */
  keys = $state(false);
  /** Said aloud by screen readers. */
  spoken = $state("");
  notes = $state<{ id: number; text: string; bad: boolean }[]>([]);
  now = $state(Date.now());
  private count = 0;

  constructor() {
    addEventListener("hashchange", () => (this.place = read()));
    setInterval(() => (this.now = Date.now()), 1000);
    this.dress();
  }

  go(hash: string): void {
    if (hash) location.hash = hash;
    else if (location.hash) {
      history.pushState(null, "", location.pathname + location.search);
      this.place = { name: "home" };
    }
  }

  turn(): void {
    this.theme = STYLES[(STYLES.indexOf(this.theme) + 1) % STYLES.length]!;
    store("theme", this.theme);
    this.dress();
  }

  allowShortcuts(on: boolean): void {
    this.shortcuts = on;
    store("shortcuts", on ? "on" : "off");
  }

  say(text: string): void {
    // the same words twice are said twice
    this.spoken = text === this.spoken ? `${text}\u00a0` : text;
  }

  note(text: string, bad = false): void {
    const id = ++this.count;
    this.notes.push({ id, text, bad });
    setTimeout(() => this.drop(id), bad ? 12_000 : 5000);
  }

  drop(id: number): void {
    this.notes = this.notes.filter((note) => note.id !== id);
  }

  private dress(): void {
    const root = document.documentElement;
    if (this.theme === "auto") root.removeAttribute("data-theme");
    else root.dataset.theme = this.theme;
  }
}

export const view = new PageState();

export const still = (): boolean => matchMedia("(prefers-reduced-motion: reduce)").matches;
