// On every page: dark and light, and the button that copies a command.
'use strict';
(() => {
  const root = document.documentElement;
  const stored = () => {
    try { return localStorage.getItem('theme'); } catch { return null; }
  };
  if (stored()) root.dataset.theme = stored();

  function switchTheme() {
    const system = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
    root.dataset.theme = (root.dataset.theme ?? system) === 'dark' ? 'light' : 'dark';
    try { localStorage.setItem('theme', root.dataset.theme); } catch { /* for this page */ }
  }

  async function copy(button) {
    const code = document.getElementById('command');
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = 'Copied';
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = 'Selected';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 2000);
  }

  document.addEventListener('DOMContentLoaded', () => {
    document.getElementById('theme').addEventListener('click', switchTheme);
    const button = document.getElementById('copy');
    button?.addEventListener('click', () => copy(button));
  });
})();
