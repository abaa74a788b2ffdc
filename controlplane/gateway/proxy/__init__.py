"""The data path: from a client's request to an engine's response.

The life of a request, function by function:

1. ``Gateway._infer`` (:mod:`controlplane.gateway.gateway`) gets a request that was read completely and
   creates its :class:`~controlplane.gateway.request_context.RequestContext`:
   :func:`controlplane.gateway.request_body.parse` decodes the few members that routing needs, and the rest of
   the body stays as bytes. ``_infer`` calls :meth:`~.relay.Relay.serve` and turns the errors that ``serve``
   raises into responses or error events.
2. :meth:`~.dispatch.RequestDispatch.route` resolves which tiers may serve the request
   (:func:`controlplane.core.routing.tier_table.resolve`).
3. :meth:`~.dispatch.RequestDispatch.start` gets a slot at an endpoint from
   :meth:`controlplane.core.routing.dispatcher.Dispatcher.submit`:
   :func:`~controlplane.core.routing.router.choose_endpoint` filters the endpoints, scores two of them and
   picks one. If none has room, the request waits in the admission queue, as a future, until
   :meth:`~.dispatch.RequestDispatch.pump` starts it, its deadline passes, or its client leaves.
4. :meth:`~.attempts.Attempts.begin` creates the :class:`~.attempt.Attempt` that uses the slot.
   :meth:`~.attempt.Attempt.send` takes an idle connection (:class:`~.upstream.UpstreamOrigin`) or opens one,
   writes the request and waits for the response's head. :class:`~.timeouts.TimeoutWatcher` watches the
   attempt from here.
5. ``Relay._open`` waits for the first token of a stream, or for a whole response that is not streamed
   (:meth:`~.attempt.Attempt.receive`); with hedging, ``Relay._open_hedged`` races a second attempt against
   the first. A failure up to here is invisible to the client: :meth:`~.attempts.Attempts.failed` releases the
   slot and reports the failure to the circuit breaker, at once or after a verdict
   (:class:`~.verdicts.Verdicts`), :func:`controlplane.core.routing.retry.next_step` decides whether
   :meth:`~.attempts.Attempts.retry_or_raise` returns for another attempt, and step 3 follows again.
6. ``Relay._whole`` sends a complete response; ``Relay._stream`` relays events as they come and records them
   (:class:`~.resume.StreamRecorder`). :meth:`~.attempt.Attempt.succeed` releases the slot and the connection,
   which starts queued requests; :meth:`~.attempts.Attempts.finished` accounts for tokens and GPU time, and
   ``Metrics.finished`` counts the request.
7. If the engine is lost in mid-stream, :meth:`~.resumption.Resumption.resume` continues it on another engine:
   :func:`~.resume.plan` decides how, steps 3 and 4 give it an attempt, and :class:`~.resume.Splice` turns the
   new stream into the rest of the old one. If that is impossible, the stream ends with an error event
   (:func:`~.responses.error_event`).
"""
