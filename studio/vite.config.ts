import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig, type Plugin } from "vite";

const HERE = import.meta.dirname;
const OUT = join(HERE, "../src/tubelet/serve/studio");
const SOURCES = ["index.html", "package.json", "package-lock.json", "svelte.config.js", "tsconfig.json", "vite.config.ts", "src"];

function files(path: string): string[] {
  try {
    return readdirSync(path, { withFileTypes: true }).flatMap((entry) => files(join(path, entry.name)));
  } catch {
    return [path];
  }
}

/** Writes the sha256 of every source beside the bundle, so that a test without Node can tell a stale bundle. */
function manifest(): Plugin {
  return {
    name: "source-manifest",
    apply: "build",
    closeBundle() {
      const hashes: Record<string, string> = {};
      for (const path of SOURCES.flatMap((name) => files(join(HERE, name))).sort()) {
        hashes[relative(HERE, path)] = createHash("sha256").update(readFileSync(path)).digest("hex");
      }
      writeFileSync(join(OUT, "sources.json"), JSON.stringify(hashes, null, 1) + "\n");
    },
  };
}

export default defineConfig({
  base: "./",
  plugins: [svelte(), manifest()],
  build: {
    outDir: OUT,
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000" } },
});
