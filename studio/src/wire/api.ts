/** The wire: the public API of the server, one function a call. Nothing here knows of the page. */

export type Status = "queued" | "in_progress" | "completed" | "failed";

export interface Film {
  id: string;
  status: Status;
  /** Per cent, 100 only when the film can be fetched. */
  progress: number;
  created_at: number;
  completed_at?: number | null;
  model: string;
  /** "1280x720", width first. */
  size?: string | null;
  rendered_size?: string | null;
  seconds?: string | null;
  prompt?: string | null;
  /** What the model read, where the words were filled in. */
  text?: string | null;
  task?: string | null;
  seed?: number | null;
  steps?: number | null;
  guidance?: number | null;
  strength?: number | null;
  fps?: number | null;
  num_frames?: number | null;
  loop?: boolean | null;
  /** False: the model read the words as they are. */
  expand?: boolean | null;
  shots?: Shot[] | null;
  parent_id?: string | null;
  remixed_from_video_id?: string | null;
  queue_position?: number | null;
  eta_ms?: number | null;
  preview?: boolean | null;
  error?: { code?: string; message?: string } | null;
}

export interface Shot {
  prompt: string;
  seconds: number;
  /** It begins anew, instead of going on from the shot before. */
  cut?: boolean;
}

export interface Page {
  data: Film[];
  has_more: boolean;
  last_id?: string | null;
}

export interface Queue {
  paused: boolean;
  /** Workers that were heard of lately. */
  workers: number;
}

export interface Model {
  id: string;
  /** The system behind the name; another name than its own is an alias. */
  system: string;
  /** What it makes, width first; its own size comes first. */
  sizes: string[];
  seconds: string[];
}

export interface Check {
  type: string;
  outcome: "detected" | "not_detected";
  validation_state: "trusted" | "valid" | "invalid" | "not_present";
  issuer?: string | null;
  model?: string | null;
  generated_at?: string | null;
  /** Why nothing could be looked for. */
  reason?: string | null;
}

export interface Limits {
  rpm: number | null;
  queued: number | null;
  running: number | null;
  /** Seconds of film a day. */
  daily: number | null;
  /** GB. */
  stored: number | null;
}

export interface Key {
  id: string;
  name: string;
  scopes: string[];
  limits: Limits;
}

export interface KeyState extends Key {
  usage: { queued: number; running: number; daily: number; stored: number };
}

/** How a finished film can be had; "video" is the mp4, the others are made of it. */
export type Kept = "video" | "webp" | "gif";
export type Variant = Kept | "thumbnail" | "spritesheet" | "preview";

/** The server answered with an error. */
export class Refusal extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

/** The server did not answer. */
export class Away extends Error {
  constructor() {
    super("The server is away.");
  }
}

/** The key lives in this variable only: never in storage, never in an address. */
let key = "";
let refused: () => void = () => {};

export function useKey(value: string): void {
  key = value.trim();
}

export function hasKey(): boolean {
  return key !== "";
}

/** `call` runs whenever the server asks for a key. */
export function onKeyAsked(call: () => void): void {
  refused = call;
}

export function address(path: string): string {
  return new URL(path, document.baseURI).href;
}

export async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let answer: Response;
  try {
    answer = await fetch(address(path), { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Away();
  }
  if (answer.ok) return answer;
  if (answer.status === 401) refused();
  const said = (await answer.json().catch(() => null)) as { error?: { code?: string; message?: string } } | null;
  const message = said?.error?.message || `The server answered ${answer.status}.`;
  throw new Refusal(answer.status, said?.error?.code ?? "", message);
}

async function json<T>(path: string, init?: RequestInit): Promise<T> {
  return (await (await ask(path, init)).json()) as T;
}

function post(body: unknown): RequestInit {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

export function page(after: string | null, limit = 100): Promise<Page> {
  const query = new URLSearchParams({ limit: String(limit), order: "desc" });
  if (after) query.set("after", after);
  return json(`v1/videos?${query}`);
}

export const get = (id: string): Promise<Film> => json(`v1/videos/${id}`);
export const cancel = (id: string): Promise<Film> => json(`v1/videos/${id}/cancel`, { method: "POST" });
export const remove = (id: string): Promise<unknown> => json(`v1/videos/${id}`, { method: "DELETE" });
export const move = (id: string, place: number): Promise<Film> => json(`v1/videos/${id}/move`, post({ place }));
export const queue = (): Promise<Queue> => json("v1/queue");
export const pause = (paused: boolean): Promise<Queue> => json("v1/queue", post({ paused }));
/** `model` empty: the default one. */
export const expand = (prompt: string, model: string, signal: AbortSignal): Promise<{ text: string }> =>
  json("v1/expansions", { ...post(model ? { prompt, model } : { prompt }), signal });

export const ownKey = (): Promise<KeyState> => json("v1/key");
export const keys = async (): Promise<Key[]> => (await json<{ data: Key[] }>("v1/keys")).data;
export const createKey = (asked: object): Promise<Key & { secret: string }> => json("v1/keys", post(asked));
export const revokeKey = (id: string): Promise<unknown> => json(`v1/keys/${id}`, { method: "DELETE" });

/** The default one first. */
export const models = async (): Promise<Model[]> => (await json<{ data: Model[] }>("v1/models")).data;

export function content(id: string, variant: Variant): string {
  return `v1/videos/${id}/content?variant=${variant}`;
}

export async function bytes(id: string, variant: Variant): Promise<Blob> {
  return (await ask(content(id, variant), { cache: variant === "preview" ? "no-store" : "default" })).blob();
}

/** The certificate under which the server's films are signed. */
export async function root(): Promise<Blob> {
  return (await ask("v1/provenance/root.pem")).blob();
}

export async function check(file: Blob): Promise<Check[]> {
  const form = new FormData();
  form.set("file", file, "film.mp4");
  return (await json<{ results: Check[] }>("v1/content_provenance_checks", { method: "POST", body: form })).results;
}

/** One film to be made. `token` makes a second try of the same request harmless. */
export interface Wish {
  path: string;
  body: FormData | Record<string, unknown>;
  token: string;
}

export function make(wish: Wish): Promise<Film> {
  const init = wish.body instanceof FormData ? { method: "POST", body: wish.body } : post(wish.body);
  return json(wish.path, { ...init, headers: { ...init.headers, "Idempotency-Key": wish.token } });
}
