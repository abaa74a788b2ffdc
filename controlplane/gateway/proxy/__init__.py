"""From a client's request to an engine's answer: the data path.

One request's life, function by function:

1. ``Gateway._infer`` (:mod:`controlplane.gateway.gateway`) gets a request that was read whole and makes a
   :class:`~.request_context.RequestContext` of it: :func:`~.body.parse` decodes the few members that routing
   needs, the rest of the body stays as bytes. It calls :meth:`~.relay.Relay.serve` and turns the errors that
   ``serve`` raises into responses or error events.
2. :meth:`~.dispatch.RequestDispatch.route` resolves which tiers may serve it
   (:func:`controlplane.core.routing.tier_table.resolve`).
3. :meth:`~.dispatch.RequestDispatch.start` gets a slot of an endpoint for it from
   :meth:`controlplane.core.routing.dispatcher.Dispatcher.submit`:
   :func:`~controlplane.core.routing.router.choose_endpoint` filters the endpoints, scores two of them and
   picks one. If none has room, the request waits in the admission queue, as a future, until
   :meth:`~.dispatch.RequestDispatch.pump` starts it, its deadline passes, or its client leaves.
4. :meth:`~.attempts.Attempts.begin` makes an :class:`~.attempt.Attempt` of the slot.
   :meth:`~.attempt.Attempt.send` takes an idle connection (:class:`~.upstream.UpstreamOrigin`) or opens one,
   writes the request and waits for the response's head. :class:`~.timeouts.TimeoutWatcher` watches the
   attempt from here.
5. ``Relay._open`` waits for the first event of a stream, or for the whole of another answer; with hedging,
   ``Relay._open_hedged`` races a second attempt against the first. A failure up to here is invisible to the
   client: :meth:`~.attempts.Attempts.failed` releases the slot and tells the circuit breaker,
   :meth:`~.attempts.Attempts.retry_or_raise` asks :func:`controlplane.core.routing.retry.next_step`, and
   ``serve`` goes back to step 3.
6. ``Relay._whole`` sends a complete answer; ``Relay._stream`` relays events as they come and records them
   (:class:`~.resume.StreamRecorder`). :meth:`~.attempt.Attempt.succeed` gives slot and connection back, which
   starts queued requests; :meth:`~.attempts.Attempts.finished` accounts for tokens and GPU time, and
   ``Metrics.finished`` counts the request.
7. If the engine is lost in mid-stream, :meth:`~.resumption.Resumption.resume` continues at another engine:
   :func:`~.resume.plan` decides how, steps 3 and 4 give it an attempt, and :class:`~.resume.Splice` turns the
   new stream into the rest of the old one. If that is impossible, the stream ends with an error event
   (:func:`~.responses.error_event`).
"""
