defmodule Bombus.Serving.Remote do
  @moduledoc false
  # Requests on whichever node their serving is. The engine sends its events to processes of its own
  # node only: for a caller on another node one of those owns the request, and hands them on.

  alias Bombus.{Error, Native}
  alias Bombus.Serving.{Client, Deadline, Peer, Request, Requests}

  @doc "Starts a request, as `Bombus.Serving.Request.start/4`, on the node of the process `server`."
  def start(serving, input, server, options) when node(server) != node() do
    with {:ok, request} <- start_there(serving, input, server, options) do
      Requests.add(request.reference, {:remote, request.generation})
      {:ok, %{request | owner: self()}}
    end
  end

  def start(serving, input, server, options), do: Request.start(serving, input, server, options)

  # The `generation` of such a request is the process that owns it. Its reference is an alias of the
  # caller's, so that nothing comes any more once the caller has gone on to other things.
  defp start_there(serving, input, server, options) do
    reference = :erlang.alias()
    deadline = Keyword.get(options, :deadline, :infinity)
    monitor = :erlang.spawn_request(node(server), __MODULE__, :own, [self()], [:monitor])

    receive do
      {:spawn_reply, ^monitor, :ok, owner} ->
        # No argument of the process: those are logged where it fails.
        options = Keyword.put(options, :deadline, Deadline.left(deadline))
        send(owner, {:run, reference, input, server, options})

        {:ok,
         %Request{
           reference: reference,
           generation: owner,
           monitor: monitor,
           window: options[:window],
           tokenizer?: serving.tokenizer != nil,
           deadline: deadline
         }}

      {:spawn_reply, ^monitor, :error, _reason} ->
        :erlang.unalias(reference)
        Peer.no_connection(node(server))
    after
      Deadline.left(deadline) ->
        :erlang.unalias(reference)
        abandon(monitor)
        Deadline.error()
    end
  end

  # Where it has started meanwhile, it ends by itself: nobody takes what it sends.
  defp abandon(monitor) do
    unless :erlang.spawn_request_abandon(monitor) do
      receive do
        {:spawn_reply, ^monitor, :ok, owner} -> Process.exit(owner, :kill)
        {:spawn_reply, ^monitor, :error, _reason} -> :ok
      end

      Process.demonitor(monitor, [:flush])
    end
  end

  @doc "On the serving's node: hands on what the engine says, and the errors of a start."
  def own(caller) do
    monitor = Process.monitor(caller)
    # What is written here belongs to this node, not to the caller's.
    if user = Process.whereis(:user), do: Process.group_leader(self(), user)

    receive do
      {:DOWN, ^monitor, :process, _pid, _reason} -> :ok
      {:run, reference, input, server, options} -> run(input, server, options, reference, monitor)
    end
  end

  # `:deadline` is what is left, since nodes have clocks of their own.
  defp run(input, server, options, reference, monitor) do
    case start_here(input, server, options) do
      {:ok, request} -> hand_on(request, monitor, reference)
      {:error, error} -> send(reference, {reference, {:error, error}})
    end
  end

  # Whoever waits for the answer does not see this process end.
  defp start_here(input, server, options) do
    deadline = Deadline.new(options[:deadline])

    with {:ok, serving, server} <- Client.checkout(server, Deadline.timeout(deadline)),
         do: Request.start(serving, input, server, Keyword.put(options, :deadline, deadline))
  rescue
    error ->
      Error.error(
        :bad_request,
        "this cannot run on #{node()}: #{Exception.message(error)} (an adapter must have been loaded there)"
      )
  end

  defp hand_on(%{reference: own, monitor: server} = request, caller, reference) do
    receive do
      {^own, event} ->
        # Read is what the caller has read.
        event = Request.received(%{request | window: nil}, event)
        send(reference, {reference, event})
        if match?({:chunk, _, _, _}, event), do: hand_on(request, caller, reference)

      {:acknowledge, ^reference} ->
        Native.acknowledge(request.generation, 1)
        hand_on(request, caller, reference)

      {:cancel, ^reference} ->
        Native.cancel(request.generation)
        hand_on(request, caller, reference)

      {:DOWN, ^caller, :process, _pid, _reason} ->
        Request.cancel(request)

      {:DOWN, ^server, :process, _pid, _reason} ->
        Request.cancel(request)
        send(reference, {reference, Error.error(:stopped, "the serving has stopped")})
    end
  end
end
