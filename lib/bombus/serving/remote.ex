defmodule Bombus.Serving.Remote do
  @moduledoc false
  # A request from another node. The engine sends its events to processes of its own node only: one
  # of those owns the request, and hands them on to the caller.

  alias Bombus.{Error, Native}
  alias Bombus.Serving.Request

  @doc "In the caller: a request whose `generation` is the process that owns it."
  def start(serving, input, server) do
    reference = make_ref()

    with {:ok, owner} <- GenServer.call(server, {:start, input, reference}, :infinity) do
      {:ok,
       %Request{
         reference: reference,
         generation: owner,
         monitor: Process.monitor(owner),
         tokenizer?: serving.tokenizer != nil
       }}
    end
  catch
    :exit, _reason -> Error.error(:stopped, "the serving stopped, or its node is gone")
  end

  @doc "In the caller: the end comes as for any other."
  def cancel(owner, reference), do: send(owner, {:cancel, reference})

  @doc "On the serving's node: answers `from` when the request is in the queue."
  def own(serving, input, server, {caller, _tag} = from, reference) do
    monitor = Process.monitor(caller)

    case start_here(serving, input, server) do
      {:ok, request} ->
        GenServer.reply(from, {:ok, self()})
        hand_on(request, caller, monitor, reference)

      {:error, error} ->
        GenServer.reply(from, {:error, error})
    end
  end

  # Whoever waits for the answer does not see this process end.
  defp start_here(serving, input, server) do
    Request.start(serving, input, server)
  rescue
    error in ArgumentError ->
      Error.error(
        :bad_request,
        "this cannot run on #{node()}: #{Exception.message(error)} (an adapter must have been loaded there)"
      )
  end

  defp hand_on(%{reference: own, monitor: server} = request, caller, monitor, reference) do
    receive do
      {^own, event} ->
        event = Request.received(request, event)
        send(caller, {reference, event})
        if match?({:chunk, _, _, _}, event), do: hand_on(request, caller, monitor, reference)

      {:cancel, ^reference} ->
        Native.cancel(request.generation)
        hand_on(request, caller, monitor, reference)

      {:DOWN, ^monitor, :process, _pid, _reason} ->
        Request.cancel(request)

      {:DOWN, ^server, :process, _pid, _reason} ->
        Request.cancel(request)
        send(caller, {reference, Error.error(:stopped, "the serving stopped")})
    end
  end
end
