/**
 * What this tab gave along with each film, which the server keeps but does not give back: pictures, clips and the second film.
 * Files are held in memory only. That there were some, and which film was the second, is known after a reload, too.
 */

export type Role = "first" | "last" | "clip" | "second";
/** A file, the id of a film, or null for a file that did not outlive a reload. */
export type Given = File | string | null;

export interface Inputs {
  given: Partial<Record<Role, Given>>;
  /** Of the new piece, as they were asked for; a film's own seconds are those of the whole. */
  seconds: string;
}

const KEPT = "asked";
const MOST = 200;
const known = new Map<string, Inputs>();

try {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]") as [string, Inputs][];
  for (const [id, inputs] of kept) known.set(id, inputs);
} catch {
  // nothing was kept
}

function store(): void {
  const kept = JSON.stringify([...known], (_, value: unknown) => (value instanceof File ? null : value));
  try {
    sessionStorage.setItem(KEPT, kept);
  } catch {
    // a browser that keeps nothing still works
  }
}

export function remember(id: string, inputs: Inputs): void {
  known.set(id, inputs);
  if (known.size > MOST) known.delete(known.keys().next().value!);
  store();
}

export function recall(id: string): Inputs | undefined {
  return known.get(id);
}

/** A film that is deleted takes along what it was made from. */
export function forget(id: string): void {
  if (known.delete(id)) store();
}
