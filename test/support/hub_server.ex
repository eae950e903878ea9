defmodule Bombus.HubServer do
  @moduledoc false
  # A Hub in real HTTP, for tests: repositories as maps of files, what huggingface_hub asks of the
  # real one, and faults to order. Large files come from another host (another port of this one).

  @doc "`repositories`: `%{\"owner/name\" => %{path => bytes}}`"
  def start(repositories) do
    {:ok, hub} = listen()
    {:ok, cdn} = listen()

    state = %{
      repositories: Map.new(repositories, fn {id, files} -> {id, %{"main" => files}} end),
      faults: [],
      requests: [],
      sizes?: false,
      hub: port(hub),
      cdn: port(cdn)
    }

    {:ok, agent} = Agent.start_link(fn -> state end)

    for {host, socket} <- [hub: hub, cdn: cdn] do
      acceptor = spawn_link(fn -> receive(do: (:go -> accept(agent, host, socket))) end)
      :ok = :gen_tcp.controlling_process(socket, acceptor)
      send(acceptor, :go)
    end

    agent
  end

  def url(server), do: "http://127.0.0.1:#{Agent.get(server, & &1.hub)}"

  @doc "All that was asked: `%{host: :hub | :cdn, method:, path:, headers:}`, the first one first."
  def requests(server), do: server |> Agent.get(& &1.requests) |> Enum.reverse()

  @doc "The listing says how large files are from now on, as the real one's does."
  def list_sizes(server), do: Agent.update(server, &%{&1 | sizes?: true})

  def forget(server), do: Agent.update(server, &%{&1 | requests: []})

  @doc """
  The next requests that match get these answers, one each, instead of what they should; `:ok` is
  what they should.

    * `{status, headers}`
    * `{:cut, n}` - the body ends after n bytes, and with it the connection
    * `{:cut_chunk, n}` - the same in a chunk, which does not say how long the whole is
    * `{:trickle, n}` - after n bytes the rest comes byte by byte
    * `{:hold, n, pid}` - after n bytes it waits: `pid` gets `{:held, connection}`, which takes `:more`
      for another n and `:go` for the rest
    * `:wrong_bytes` - of the right number
    * `:endless` - without a length, and without an end
    * `{:length, n}` - all of it, with a length that lies
    * `{:body, bytes}` - another body, which nobody has announced
    * `:slow_headers` - a byte of the head now and then
    * `:no_range` - all of it, whatever part was asked for; `{:cut_from_0, n}` - cut, too
    * `{:headers, function}` - with other headers; `{:no_length, function}` - and without the size
  """
  def fault(server, host, method, pattern, answers) do
    Agent.update(server, fn state ->
      %{state | faults: state.faults ++ [{host, method, pattern, answers}]}
    end)
  end

  @doc "No faults any more."
  def forget_faults(server), do: Agent.update(server, &%{&1 | faults: []})

  @doc "The repository's revision is these files from now on."
  def push(server, id, files, revision \\ "main") do
    Agent.update(server, &put_in(&1, [:repositories, Access.key(id, %{}), revision], files))
  end

  @doc "git's name of a commit with these files."
  def commit(files) do
    hex(:sha, :erlang.term_to_binary(Enum.sort(files)))
  end

  def etag(bytes) do
    if large?(bytes),
      do: hex(:sha256, bytes),
      else: hex(:sha, ["blob #{byte_size(bytes)}\0", bytes])
  end

  # What is in LFS, on the real one.
  defp large?(bytes), do: byte_size(bytes) > 20_000

  defp hex(algorithm, bytes), do: algorithm |> :crypto.hash(bytes) |> Base.encode16(case: :lower)

  defp listen do
    :gen_tcp.listen(0, [
      :binary,
      active: false,
      packet: :http_bin,
      reuseaddr: true,
      ip: {127, 0, 0, 1},
      backlog: 64
    ])
  end

  defp port(socket), do: elem({:ok, _} = :inet.port(socket), 1)

  defp accept(agent, host, listener) do
    with {:ok, socket} <- :gen_tcp.accept(listener) do
      server = spawn(fn -> receive(do: (:go -> serve(agent, host, socket))) end)
      :ok = :gen_tcp.controlling_process(socket, server)
      send(server, :go)
      accept(agent, host, listener)
    end
  end

  # One connection, kept while the client wants more.
  defp serve(agent, host, socket) do
    with {:ok, {:http_request, method, {:abs_path, target}, _version}} <- :gen_tcp.recv(socket, 0) do
      path = target |> String.split("?") |> hd()
      request = %{host: host, method: to_string(method), path: path, headers: headers(socket)}
      fault = Agent.get_and_update(agent, &note(&1, request))
      all? = match?({:cut_from_0, _}, fault) or fault == :no_range
      asked = if all?, do: put_in(request.headers["range"], nil), else: request

      case answer(socket, request, response(Agent.get(agent, & &1), asked), fault) do
        :more ->
          :inet.setopts(socket, packet: :http_bin)
          serve(agent, host, socket)

        :closed ->
          :gen_tcp.close(socket)
      end
    end
  end

  defp headers(socket) do
    Stream.repeatedly(fn -> :gen_tcp.recv(socket, 0) end)
    |> Enum.take_while(&match?({:ok, {:http_header, _, _, _, _}}, &1))
    |> Map.new(fn {:ok, {:http_header, _, _, name, value}} -> {String.downcase(name), value} end)
  end

  defp note(state, request) do
    {fault, faults} = take_fault(state.faults, request)
    {fault, %{state | faults: faults, requests: [request | state.requests]}}
  end

  defp take_fault([], _request), do: {:ok, []}

  defp take_fault([{host, method, pattern, [answer | rest]} = fault | others], request) do
    if request.host == host and request.method == method and request.path =~ pattern do
      {answer, [{host, method, pattern, rest} | others]}
    else
      {answer, others} = take_fault(others, request)
      {answer, [fault | others]}
    end
  end

  defp take_fault([{_, _, _, []} | others], request), do: take_fault(others, request)

  # -> {status, headers, body}

  defp response(state, %{host: :cdn, path: "/blobs/" <> etag} = request) do
    blobs =
      for {_id, revisions} <- state.repositories, {_, files} <- revisions, {_, b} <- files, do: b

    case Enum.find(blobs, &(etag(&1) == etag)) do
      nil -> {404, [], ""}
      # Signed addresses are for one method.
      _bytes when request.method == "HEAD" -> {403, [], ""}
      bytes -> part(bytes, [{"ETag", ~s("#{etag}")}], request)
    end
  end

  defp response(state, %{host: :hub, path: "/api/models/" <> rest}) do
    case Regex.run(~r{^(.+?)/(revision|tree)/(.+)$}, rest) || [rest, rest, "revision", "main"] do
      [_all, id, what, revision] ->
        with {:ok, commit, files} <- find(state, id, revision) do
          what |> listing(id, commit, files) |> sized(files, state) |> json()
        end
    end
  end

  defp response(state, %{host: :hub} = request) do
    with [_all, id, revision, path] <- Regex.run(~r{^/(.+?)/resolve/([^/]+)/(.+)$}, request.path),
         {:ok, commit, files} <- find(state, id, URI.decode(revision)) do
      commit = {"X-Repo-Commit", commit}

      case files[URI.decode(path)] do
        nil -> {404, [commit, {"X-Error-Code", "EntryNotFound"}], ""}
        bytes -> file(state, bytes, commit, request)
      end
    else
      nil -> {404, [], ""}
      refusal -> refusal
    end
  end

  defp file(state, bytes, commit, request) do
    etag = etag(bytes)

    if large?(bytes) do
      location = "http://127.0.0.1:#{state.cdn}/blobs/#{etag}?signature=abc"

      {302,
       [
         commit,
         {"Location", location},
         {"X-Linked-Etag", ~s("#{etag}")},
         {"X-Linked-Size", "#{byte_size(bytes)}"}
       ], ""}
    else
      part(bytes, [commit, {"ETag", ~s("#{etag}")}], request)
    end
  end

  defp part(bytes, headers, %{headers: %{"range" => "bytes=" <> range}}) do
    [first | _] = String.split(range, "-")
    {first, size} = {String.to_integer(first), byte_size(bytes)}

    if first < size do
      range = {"Content-Range", "bytes #{first}-#{size - 1}/#{size}"}
      {206, [range | headers], binary_part(bytes, first, size - first)}
    else
      {416, [{"Content-Range", "bytes */#{size}"}], ""}
    end
  end

  defp part(bytes, headers, _request), do: {200, headers, bytes}

  defp find(state, id, revision) do
    revisions = state.repositories[id]
    by_commit = fn files -> {:ok, commit(files), files} end

    cond do
      revisions == nil ->
        {401, [{"X-Error-Code", "RepoNotFound"}], ""}

      files = revisions[revision] ->
        by_commit.(files)

      files = Enum.find(Map.values(revisions), &(commit(&1) == revision)) ->
        by_commit.(files)

      true ->
        {404, [{"X-Error-Code", "RevisionNotFound"}], ""}
    end
  end

  defp listing("revision", id, commit, files) do
    %{id: id, sha: commit, siblings: for({path, _} <- files, do: %{rfilename: path})}
  end

  defp listing("tree", _id, _commit, files) do
    for {path, bytes} <- files do
      file = %{type: "file", path: path, size: byte_size(bytes), oid: hex(:sha, bytes)}
      lfs = %{oid: etag(bytes), size: byte_size(bytes), pointerSize: 130}
      if large?(bytes), do: Map.put(file, :lfs, lfs), else: file
    end
  end

  defp sized(%{siblings: siblings} = listing, files, %{sizes?: true}) do
    siblings = for one <- siblings, do: Map.put(one, :size, byte_size(files[one.rfilename]))
    %{listing | siblings: siblings}
  end

  defp sized(listing, _files, _state), do: listing

  defp json(term), do: {200, [{"Content-Type", "application/json"}], JSON.encode!(term)}

  defp answer(socket, request, {status, headers, body}, fault) do
    head? = request.method == "HEAD"

    case fault do
      fault when fault in [:ok, :no_range] ->
        write(socket, head?, status, headers, byte_size(body), body)

      {:headers, fun} ->
        write(socket, head?, status, fun.(headers), byte_size(body), body)

      {:no_length, fun} ->
        write(socket, head?, status, fun.(headers), nil, body)

      {status, headers} when is_integer(status) ->
        write(socket, head?, status, headers, 0, "")

      :wrong_bytes ->
        <<first, rest::binary>> = body
        write(socket, head?, status, headers, byte_size(body), <<255 - first, rest::binary>>)

      {cut, n} when cut in [:cut, :cut_from_0] ->
        write(socket, head?, status, headers, byte_size(body), binary_part(body, 0, n))
        :closed

      {:cut_chunk, n} ->
        chunk = [Integer.to_string(byte_size(body), 16), "\r\n", binary_part(body, 0, n)]
        write(socket, head?, status, [{"Transfer-Encoding", "chunked"} | headers], nil, chunk)

      {:hold, n, pid} ->
        write(socket, head?, status, headers, byte_size(body), "")
        send(pid, {:held, self()})
        hold(socket, n, body)
        :more

      :endless ->
        write(socket, head?, status, List.keydelete(headers, "X-Linked-Size", 0), nil, body)
        if head?, do: :closed, else: endless(socket, :binary.copy("x", 100_000))

      {:length, n} ->
        write(socket, head?, status, headers, n, body)
        :closed

      {:body, bytes} ->
        write(socket, head?, 200, headers, byte_size(bytes), bytes)

      :slow_headers ->
        :inet.setopts(socket, packet: :raw)
        trickle(socket, "HTTP/1.1 200 X\r\n" <> String.duplicate("A: b\r\n", 10_000), 200)

      {:trickle, n} ->
        <<first::binary-size(n), rest::binary>> = body
        write(socket, head?, status, headers, byte_size(body), first)
        trickle(socket, rest)
    end
  end

  defp hold(socket, n, body) do
    <<next::binary-size(n), rest::binary>> = body
    :gen_tcp.send(socket, next)

    receive do
      :more -> hold(socket, n, rest)
      :go -> :gen_tcp.send(socket, rest)
    end
  end

  # Until the client goes.
  defp trickle(socket, bytes, pause \\ 10)
  defp trickle(_socket, "", _pause), do: :closed

  defp trickle(socket, <<byte, rest::binary>>, pause) do
    Process.sleep(pause)
    if :gen_tcp.send(socket, <<byte>>) == :ok, do: trickle(socket, rest, pause), else: :closed
  end

  defp endless(socket, bytes) do
    if :gen_tcp.send(socket, bytes) == :ok, do: endless(socket, bytes), else: :closed
  end

  # Without a length, the body of an answer ends with the connection.
  defp write(socket, head?, status, headers, length, body) do
    length = if length, do: [{"Content-Length", "#{length}"}], else: [{"Connection", "close"}]
    headers = for {name, value} <- length ++ headers, do: "#{name}: #{value}\r\n"
    head = ["HTTP/1.1 #{status} X\r\n", headers, "\r\n"]
    :inet.setopts(socket, packet: :raw)
    _sent = :gen_tcp.send(socket, if(head?, do: head, else: [head, body]))
    if match?([{"Connection", _}], length), do: :closed, else: :more
  end
end
