defmodule Bombus.ModuleUses do
  @moduledoc false
  # Which modules a source names, read from its syntax tree: in full, by an alias, or in a group of
  # aliases. Types do not count, nor those in a table of options: they call nothing.

  @types [:spec, :type, :typep, :opaque, :callback, :macrocallback]

  @doc "The module that a source defines, and those that it names."
  @spec of(String.t()) :: {module(), [module()]}
  def of(source) do
    tree = Code.string_to_quoted!(source)
    {_tree, {aliases, names}} = Macro.prewalk(tree, {%{}, []}, &name/2)
    [module | _nested] = names = Enum.reverse(names)
    {Module.concat(module), names |> Enum.map(&full(&1, aliases)) |> Enum.uniq()}
  end

  defp name({:@, _, [{type, _, _}]}, found) when type in @types, do: {nil, found}

  defp name({:type_spec, _type}, found), do: {nil, found}

  defp name({:alias, _, [{{:., _, [{_, _, base}, :{}]}, _, group}]}, {aliases, names}) do
    group = for {:__aliases__, _, parts} <- group, do: base ++ parts
    {nil, {Map.merge(aliases, Map.new(group, &{List.last(&1), &1})), names}}
  end

  defp name({:alias, _, [{:__aliases__, _, parts} | options]}, {aliases, names}) do
    name =
      with [[as: {:__aliases__, _, [name]}]] <- options, do: name, else: (_ -> List.last(parts))

    {nil, {Map.put(aliases, name, parts), names}}
  end

  defp name({:__aliases__, _, [first | _] = parts} = node, {aliases, names}) when is_atom(first),
    do: {node, {aliases, [parts | names]}}

  defp name(node, found), do: {node, found}

  defp full([first | rest] = parts, aliases) do
    case aliases do
      %{^first => base} -> Module.concat(base ++ rest)
      _none -> Module.concat(parts)
    end
  end
end
