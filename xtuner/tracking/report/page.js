for (const chart of document.querySelectorAll('svg.chart')) {
  const points = JSON.parse(chart.dataset.points);
  const cross = chart.querySelector('.cross'), spot = chart.querySelector('.spot');
  const reading = chart.parentElement.appendChild(document.createElement('div'));
  reading.className = 'reading';
  const show = visible => [cross, spot, reading].forEach(e => { e.style.visibility = visible ? 'visible' : 'hidden'; });
  chart.addEventListener('pointermove', event => {
    const box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
    const distance = p => Math.abs(p[0] - x) + Math.abs(p[1] - y) / 50;
    const near = points.reduce((best, p) => distance(p) < distance(best) ? p : best);
    cross.setAttribute('x1', near[0]); cross.setAttribute('x2', near[0]);
    spot.setAttribute('cx', near[0]); spot.setAttribute('cy', near[1]);
    const outer = chart.parentElement.getBoundingClientRect();
    reading.textContent = near[2];
    const half = reading.offsetWidth / 2 + 4;
    const left = box.left - outer.left + near[0] * scale;
    reading.style.left = Math.min(Math.max(left, half), outer.width - half) + 'px';
    reading.style.top = box.top - outer.top + near[1] * scale + 'px';
    show(true);
  });
  chart.addEventListener('pointerleave', () => {
    show(false);
    reading.style.left = '0';
    reading.textContent = '';  // a hidden reading must not make the page wider
  });
}
