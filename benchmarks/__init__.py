"""How much the library costs, measured side by side in one run; ``python -m benchmarks`` prints the table.

=================  ==========================================================
``work.py``        the handlers, and the pipelines made of them
``by_hand.py``     the same work in bare asyncio, which is the limit
``neighbours.py``  the same work by other libraries, each as its documentation shows
``retries.py``     calls guarded by us and by others
``behaviour.py``   when results come, what a slow item holds up, what a cancelled call leaves behind
``measure.py``     the clock: interleaved rounds, warm-up, garbage collection
``memory.py``      the peak of memory, one subprocess per figure
``tables.py``      which contenders meet in which row, and the Markdown
``comparison.py``  all neighbours in all rows
``page.py``        the Markdown of that, and the page of the documentation that has it
``plot.py``        its picture
=================  ==========================================================
"""
