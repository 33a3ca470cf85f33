document.addEventListener("click", (event) => {
  const { target } = event;
  if (target.matches("article img")) {
    // A figure opens in its full size over the page, where a phone can scroll it; the next tap closes it.
    event.preventDefault(); // the link to the bare picture, which a phone shrinks to its width
    const frame = document.createElement("dialog");
    frame.append(Object.assign(new Image(), { src: target.src, alt: target.alt }));
    frame.onclick = () => frame.close();
    frame.onclose = () => frame.remove();
    document.body.append(frame);
    frame.showModal();
  } else if (target.closest(".toc-tree a")) {
    // The theme leaves the drawer with the contents open, above the section to which it leads.
    document.getElementById("__toc").checked = false;
  }
});
