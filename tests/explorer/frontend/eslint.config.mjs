import js from "@eslint/js";
import ts from "typescript-eslint";

// Of the typed rules those that find what nobody would see: a promise without a catch, an answer that is never awaited.
export default [
  js.configs.recommended,
  {
    files: ["patchsae_utils/explorer/*.js"],
    languageOptions: { parser: ts.parser, parserOptions: { project: "tests/explorer/frontend/tsconfig.json" } },
    plugins: { ts: ts.plugin },
    rules: {
      "no-undef": "off", // tsc knows the browser's names
      eqeqeq: "error",
      "no-var": "error",
      "prefer-const": ["error", { destructuring: "all" }],
      "ts/no-floating-promises": "error",
      "ts/no-misused-promises": "error",
      "ts/await-thenable": "error",
    },
  },
];
